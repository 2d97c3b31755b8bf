// What the operators share: their attributes, their weights and the room for their activations.
#ifndef STEP35_OP_H
#define STEP35_OP_H

#include "int4.h"
#include "isa.h"
#include "ort_api.h"

ort_status *choose_isa(const ort_api *api, enum isa *out);

// "block": a multiple of 16 up to MOST_BLOCK that the weights' scales are for.
ort_status *block_attribute(const ort_api *api, const ort_kernel_info *info, int64_t *out);

// A copy of a kernel's state that the runtime keeps and `kernel_destroy` frees.
ort_status *keep(const ort_api *api, const void *state, size_t size, void **kernel);
void kernel_destroy(void *kernel);

// Checks weight [(stack,) tiles, columns / 8, 64] and scales [(stack,) tiles, columns / block, 16].
ort_status *matrix_of(const ort_api *api, const char *op, const struct tensor *weight,
                      const struct tensor *scales, int64_t stack, int64_t rows, int64_t columns, int64_t block,
                      struct int4_matrix *out);

// Memory for `count` quantised rows; free() what it gives, null where there is none.
void *rows_room(size_t count, size_t columns, size_t block, struct int8_rows *out);

size_t one_output(const ort_op *op);
int float_output(const ort_op *op, size_t index);
int zero_of(const ort_op *op, size_t index);
int none_of(const ort_op *op);
int one_of(const ort_op *op);
const char *any_provider(const ort_op *op);
int newest(const ort_op *op);

#define OP_COMMON                                                                                             \
  .version = ORT_VERSION, .provider = any_provider, .output_type = float_output, .destroy = kernel_destroy,  \
  .input_memory = zero_of, .input_minimum = one_of, .output_minimum = one_of, .output_alike = one_of,         \
  .first_version = one_of, .last_version = newest

// What most have: inputs and outputs that must all be there.
#define OP_PLAIN OP_COMMON, .input_kind = zero_of, .input_alike = one_of, .output_kind = zero_of

#endif
