#include "op.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

extern const struct int4_routines int4_portable, int4_avx2, int4_avx512, int4_neon;

const struct int4_routines *const int4_routines[ISA_COUNT] = {
    [ISA_PORTABLE] = &int4_portable,
#if defined(__x86_64__)
    [ISA_AVX2] = &int4_avx2,
    [ISA_AVX512] = &int4_avx512,
#elif defined(__aarch64__)
    [ISA_NEON] = &int4_neon,
#endif
};

ort_status *choose_isa(const ort_api *api, enum isa *out) {
  *out = isa_choose();
  if (*out != ISA_NONE) return NULL;
  return failure(api, ORT_FAIL, "STEP35_CPU_ISA names instructions that this processor lacks");
}

ort_status *block_attribute(const ort_api *api, const ort_kernel_info *info, int64_t *out) {
  ort_status *status = ort_attribute_int(api)(info, "block", out);
  if (!status && (*out < 16 || *out > MOST_BLOCK || *out % 16))
    status = failure(api, ORT_INVALID_ARGUMENT, "block is %lld; it must be 16, 32, ... or %d", (long long)*out,
                     MOST_BLOCK);
  return status;
}

ort_status *keep(const ort_api *api, const void *state, size_t size, void **kernel) {
  *kernel = malloc(size);
  if (!*kernel) return failure(api, ORT_FAIL, "no memory for an operator");
  memcpy(*kernel, state, size);
  return NULL;
}

void kernel_destroy(void *kernel) { free(kernel); }

static int shaped(const struct tensor *t, int64_t stack, int64_t tiles, int64_t groups, int64_t last) {
  const int64_t *dims = t->dims + (stack ? 1 : 0);
  if (t->rank != (stack ? 4 : 3) || (stack && t->dims[0] != stack)) return 0;
  return dims[0] == tiles && dims[1] == groups && dims[2] == last;
}

ort_status *matrix_of(const ort_api *api, const char *op, const struct tensor *weight,
                      const struct tensor *scales, int64_t stack, int64_t rows, int64_t columns, int64_t block,
                      struct int4_matrix *out) {
  int64_t tiles = (rows + TILE - 1) / TILE;
  if (rows < 0 || columns % block || !shaped(weight, stack, tiles, columns / 8, 64) ||
      !shaped(scales, stack, tiles, columns / block, TILE))
    return failure(api, ORT_INVALID_ARGUMENT,
                   "%s: weight and scales do not have the form of %lld rows of %lld columns in blocks of %lld", op,
                   (long long)rows, (long long)columns, (long long)block);
  *out = (struct int4_matrix){weight->data, scales->data, (size_t)columns, (size_t)block, NULL, NULL};
  return NULL;
}

void *rows_room(size_t count, size_t columns, size_t block, struct int8_rows *out) {
  void *room = malloc(rows_size(count, columns, block) + 1);
  if (room) rows_in(room, count, columns, block, out);
  return room;
}

size_t one_output(const ort_op *op) { return (void)op, 1; }
int float_output(const ort_op *op, size_t index) { return (void)op, (void)index, ORT_FLOAT; }
int zero_of(const ort_op *op, size_t index) { return (void)op, (void)index, 0; }
int none_of(const ort_op *op) { return (void)op, 0; }
int one_of(const ort_op *op) { return (void)op, 1; }
const char *any_provider(const ort_op *op) { return (void)op, (const char *)NULL; }
int newest(const ort_op *op) { return (void)op, INT_MAX; }
