// The few entries of ONNX Runtime's C API that the operators use.
//
// The API is a table of function pointers that only ever grows at its end, so an entry's place is a fact of
// the interface; `at` names the places. Everything else stays opaque.
#ifndef STEP35_ORT_API_H
#define STEP35_ORT_API_H

#include <stddef.h>
#include <stdint.h>

enum { ORT_VERSION = 17 }; // the oldest runtime whose table has all that is used here

enum { ORT_REQUIRED = 0, ORT_VARIADIC = 2 };
enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };
enum { ORT_ANY_TYPE = 0, ORT_FLOAT = 1, ORT_UINT8 = 2, ORT_INT64 = 7, ORT_FLOAT16 = 10 };

typedef struct ort_status ort_status;
typedef struct ort_value ort_value;
typedef struct ort_shape ort_shape;
typedef struct ort_kernel_info ort_kernel_info;
typedef struct ort_kernel_context ort_kernel_context;
typedef struct ort_session_options ort_session_options;
typedef struct ort_domain ort_domain;
typedef struct ort_infer_context ort_infer_context;

typedef struct ort_api {
  void (*entry[278])(void);
} ort_api;

typedef struct ort_api_base {
  const ort_api *(*get_api)(uint32_t version);
  const char *(*version)(void);
} ort_api_base;

typedef struct ort_op {
  uint32_t version;
  void *(*create)(const struct ort_op *, const ort_api *, const ort_kernel_info *);
  const char *(*name)(const struct ort_op *);
  const char *(*provider)(const struct ort_op *);
  int (*input_type)(const struct ort_op *, size_t);
  size_t (*input_count)(const struct ort_op *);
  int (*output_type)(const struct ort_op *, size_t);
  size_t (*output_count)(const struct ort_op *);
  void (*compute)(void *, ort_kernel_context *);
  void (*destroy)(void *);
  int (*input_kind)(const struct ort_op *, size_t);
  int (*output_kind)(const struct ort_op *, size_t);
  int (*input_memory)(const struct ort_op *, size_t);
  int (*input_minimum)(const struct ort_op *);
  int (*input_alike)(const struct ort_op *);
  int (*output_minimum)(const struct ort_op *);
  int (*output_alike)(const struct ort_op *);
  ort_status *(*create_checked)(const struct ort_op *, const ort_api *, const ort_kernel_info *, void **);
  ort_status *(*compute_checked)(void *, ort_kernel_context *);
  ort_status *(*infer_shape)(const struct ort_op *, ort_infer_context *);
  int (*first_version)(const struct ort_op *);
  int (*last_version)(const struct ort_op *);
  size_t (*may_inplace)(int **, int **);
  void (*release_inplace)(int *, int *);
  size_t (*alias_map)(int **, int **);
  void (*release_alias)(int *, int *);
} ort_op;

#define ORT_ENTRY(place, name, result, ...)                                 \
  typedef result (*ort_##name##_function)(__VA_ARGS__);                     \
  static inline ort_##name##_function ort_##name(const ort_api *api) {      \
    return (ort_##name##_function)api->entry[place];                        \
  }

ORT_ENTRY(0, create_status, ort_status *, int code, const char *message)
ORT_ENTRY(26, create_domain, ort_status *, const char *name, ort_domain **out)
ORT_ENTRY(27, domain_add, ort_status *, ort_domain *, const ort_op *)
ORT_ENTRY(28, options_add_domain, ort_status *, ort_session_options *, ort_domain *)
ORT_ENTRY(51, tensor_data, ort_status *, ort_value *, void **out)
ORT_ENTRY(61, rank, ort_status *, const ort_shape *, size_t *out)
ORT_ENTRY(62, dimensions, ort_status *, const ort_shape *, int64_t *out, size_t rank)
ORT_ENTRY(65, shape_of, ort_status *, const ort_value *, ort_shape **out)
ORT_ENTRY(85, attribute_float, ort_status *, const ort_kernel_info *, const char *name, float *out)
ORT_ENTRY(86, attribute_int, ort_status *, const ort_kernel_info *, const char *name, int64_t *out)
ORT_ENTRY(88, input_count, ort_status *, const ort_kernel_context *, size_t *out)
ORT_ENTRY(90, input, ort_status *, const ort_kernel_context *, size_t, const ort_value **out)
ORT_ENTRY(91, output, ort_status *, ort_kernel_context *, size_t, const int64_t *, size_t, ort_value **out)
ORT_ENTRY(99, release_shape, void, ort_shape *)
ORT_ENTRY(101, release_domain, void, ort_domain *)
ORT_ENTRY(162, attribute_floats, ort_status *, const ort_kernel_info *, const char *name, float *out, size_t *count)
ORT_ENTRY(163, attribute_ints, ort_status *, const ort_kernel_info *, const char *name, int64_t *out, size_t *count)
ORT_ENTRY(230, info_input_count, ort_status *, const ort_kernel_info *, size_t *out)
ORT_ENTRY(249, constant_input, ort_status *, const ort_kernel_info *, size_t, int *is_constant, const ort_value **out)
ORT_ENTRY(274, parallel_for, ort_status *, const ort_kernel_context *, void (*)(void *, size_t), size_t total,
          size_t batches, void *argument)

#undef ORT_ENTRY

// Shorthands for kernels; each gives the runtime's status, null when all is well.
struct tensor {
  void *data;
  int64_t dims[4];
  size_t rank;
};

ort_status *tensor_of(const ort_api *api, const ort_value *value, size_t index, struct tensor *out);
ort_status *tensor_input(const ort_api *api, ort_kernel_context *context, size_t index, struct tensor *out);
ort_status *tensor_output(const ort_api *api, ort_kernel_context *context, size_t index, const int64_t *dims,
                          size_t rank, float **out);
ort_status *failure(const ort_api *api, int code, const char *format, ...) __attribute__((format(printf, 3, 4)));

#endif
