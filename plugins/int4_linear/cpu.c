// Int4Linear(x [t, K] f32, then for each product weight u8, scales f16) -> for each product [t, N] f32.
// Int4GatedLinear(gate, up [t, K] f32, weight, scales) -> [t, N], of x = min(silu(gate), limit) * clamp(up, limit).
// Attributes: N, the last product's width, block; limit (0: none).
//
// x is quantised to int8 by block of each row, once for all products; weight [ceil(N/16), K/8, 64] and scales
// [ceil(N/16), K/block, 16] are laid out as cpu/int4.h says. Only the last product's rows may be padded.
#include <stdlib.h>
#include <string.h>

#include "../cpu/int4.h"
#include "../cpu/op.h"
#include "../cpu/work.h"
#include "linear.h"

struct state {
  const ort_api *api;
  const struct int4_routines *routines;
  int64_t width, block;
  float limit;
  int gated;
};

static ort_status *make(const ort_api *api, const ort_kernel_info *info, int gated, void **kernel) {
  struct state made = {.api = api, .gated = gated};
  enum isa isa;
  ort_status *status = choose_isa(api, &isa);
  if (!status) made.routines = int4_routines[isa];
  if (!status) status = ort_attribute_int(api)(info, "N", &made.width);
  if (!status) status = block_attribute(api, info, &made.block);
  if (!status && gated) status = ort_attribute_float(api)(info, "limit", &made.limit);
  return status ? status : keep(api, &made, sizeof made, kernel);
}

static ort_status *create(const ort_op *op, const ort_api *api, const ort_kernel_info *info, void **kernel) {
  return (void)op, make(api, info, 0, kernel);
}

static ort_status *create_gated(const ort_op *op, const ort_api *api, const ort_kernel_info *info, void **kernel) {
  return (void)op, make(api, info, 1, kernel);
}

static ort_status *compute(void *kernel, ort_kernel_context *context) {
  const struct state *self = kernel;
  const ort_api *api = self->api;
  struct tensor x, up = {0};
  size_t activations = self->gated ? 2 : 1, inputs, count;
  ort_status *status = ort_input_count(api)(context, &inputs);
  if (!status) status = tensor_input(api, context, 0, &x);
  if (!status && self->gated) status = tensor_input(api, context, 1, &up);
  if (status) return status;
  count = (inputs - activations) / 2;
  if (x.rank != 2 || (self->gated && (up.rank != 2 || memcmp(x.dims, up.dims, 2 * sizeof *x.dims))))
    return failure(api, ORT_INVALID_ARGUMENT, "Int4Linear: the activations are not [t, K]");
  if (inputs % 2 != activations % 2 || !count || count > PRODUCTS)
    return failure(api, ORT_INVALID_ARGUMENT, "Int4Linear: %zu inputs", inputs);
  struct linear l = {.routines = self->routines, .x = x.data, .up = up.data, .columns = (size_t)x.dims[1]};
  l.limit = self->limit > 0 ? self->limit : __builtin_inff();
  l.count = count;
  for (size_t i = 0; i < count; i++) {
    struct product *p = &l.products[i];
    struct tensor weight, scales;
    status = tensor_input(api, context, activations + 2 * i, &weight);
    if (!status) status = tensor_input(api, context, activations + 2 * i + 1, &scales);
    if (status) return status;
    int64_t width = i + 1 < count ? weight.dims[0] * TILE : self->width;
    status = matrix_of(api, "Int4Linear", &weight, &scales, 0, width, x.dims[1], self->block, &p->w);
    if (!status) status = tensor_output(api, context, i, (int64_t[]){x.dims[0], width}, 2, &p->y);
    if (status) return status;
    p->width = (size_t)width;
  }
  if (!x.dims[0]) return NULL;
  void *room = rows_room((size_t)x.dims[0], l.columns, (size_t)self->block, &l.rows);
  if (!room) return failure(api, ORT_FAIL, "Int4Linear: no memory for %zu rows", l.rows.count);
  linear_plan(&l);
  const struct phase phases[] = {{linear_quantise, l.quantise_units}, {linear_multiply, l.multiply_units}};
  status = do_phases(api, context, phases, 2, l.bytes, &l);
  free(room);
  return status;
}

static const char *name(const ort_op *op) { return (void)op, "Int4Linear"; }
static const char *gated_name(const ort_op *op) { return (void)op, "Int4GatedLinear"; }
static size_t two(const ort_op *op) { return (void)op, 2; }
static size_t four(const ort_op *op) { return (void)op, 4; }
static int variadic_weights(const ort_op *op, size_t index) { return (void)op, index ? ORT_VARIADIC : ORT_REQUIRED; }
static int variadic(const ort_op *op, size_t index) { return (void)op, (void)index, ORT_VARIADIC; }
static int input_type(const ort_op *op, size_t index) { return (void)op, index ? ORT_ANY_TYPE : ORT_FLOAT; }
static int gated_input_type(const ort_op *op, size_t index) {
  return (void)op, (const int[]){ORT_FLOAT, ORT_FLOAT, ORT_UINT8, ORT_FLOAT16}[index];
}

const ort_op int4_linear_op = {OP_COMMON, .name = name, .input_count = two, .output_count = one_output,
                               .input_kind = variadic_weights, .input_alike = none_of, .output_kind = variadic,
                               .input_type = input_type, .create_checked = create, .compute_checked = compute};

const ort_op int4_gated_linear_op = {OP_PLAIN, .name = gated_name, .input_count = four,
                                     .output_count = one_output, .input_type = gated_input_type,
                                     .create_checked = create_gated, .compute_checked = compute};
