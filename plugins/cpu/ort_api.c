#include "ort_api.h"

#include <stdarg.h>
#include <stdio.h>

ort_status *failure(const ort_api *api, int code, const char *format, ...) {
  char message[256];
  va_list values;
  va_start(values, format);
  vsnprintf(message, sizeof message, format, values);
  va_end(values);
  return ort_create_status(api)(code, message);
}

ort_status *tensor_of(const ort_api *api, const ort_value *value, size_t index, struct tensor *out) {
  ort_shape *shape = NULL;
  // Kernels read inputs only; the runtime has one entry for reading and writing.
  ort_status *status = ort_tensor_data(api)((ort_value *)value, &out->data);
  if (!status) status = ort_shape_of(api)(value, &shape);
  if (status) return status;
  status = ort_rank(api)(shape, &out->rank);
  if (!status && out->rank > 4)
    status = failure(api, ORT_INVALID_ARGUMENT, "input %zu has %zu dimensions", index, out->rank);
  if (!status) status = ort_dimensions(api)(shape, out->dims, out->rank);
  ort_release_shape(api)(shape);
  return status;
}

ort_status *tensor_input(const ort_api *api, ort_kernel_context *context, size_t index, struct tensor *out) {
  const ort_value *value = NULL;
  ort_status *status = ort_input(api)(context, index, &value);
  return status ? status : tensor_of(api, value, index, out);
}

ort_status *tensor_output(const ort_api *api, ort_kernel_context *context, size_t index, const int64_t *dims,
                          size_t rank, float **out) {
  ort_value *value = NULL;
  void *data = NULL;
  ort_status *status = ort_output(api)(context, index, dims, rank, &value);
  if (!status) status = ort_tensor_data(api)(value, &data);
  *out = data;
  return status;
}
