// Int4Experts(x [t, D], selection [t, E], weights [t, E] f32, gate_up u8, gate_up_scales f16, down u8,
// down_scales f16) -> [t, D] f32. Attributes: block, top_k, scale, limit (0: none).
//
// For each token the `top_k` experts with the highest selection (of equals the first), mixed by their weights
// over (their sum + 1e-20), times `scale`. An expert is down(min(silu(gate x), limit) * clamp(up x, limit)).
// gate_up [E, 2 I / 16, D / 8, 64] has tiles of 16 gate rows and the 16 up rows of the same features in turn.
//
// Sums over experts go in ascending order for every token, so a token's row does not depend on the others.
#include <stdlib.h>
#include <string.h>

#include "../cpu/int4.h"
#include "../cpu/op.h"
#include "../cpu/work.h"
#include "experts.h"

struct state {
  const ort_api *api;
  const struct int4_routines *routines;
  int64_t block, top_k;
  float scale, limit;
};

static ort_status *create(const ort_op *op, const ort_api *api, const ort_kernel_info *info, void **kernel) {
  (void)op;
  struct state made = {.api = api};
  enum isa isa;
  ort_status *status = choose_isa(api, &isa);
  if (!status) made.routines = int4_routines[isa];
  if (!status) status = block_attribute(api, info, &made.block);
  if (!status) status = ort_attribute_int(api)(info, "top_k", &made.top_k);
  if (!status) status = ort_attribute_float(api)(info, "scale", &made.scale);
  if (!status) status = ort_attribute_float(api)(info, "limit", &made.limit);
  if (!status && made.top_k < 1) status = failure(api, ORT_INVALID_ARGUMENT, "Int4Experts: top_k is below 1");
  return status ? status : keep(api, &made, sizeof made, kernel);
}

static ort_status *compute(void *kernel, ort_kernel_context *context) {
  static const char *const op = "Int4Experts";
  const struct state *self = kernel;
  const ort_api *api = self->api;
  struct tensor in[7];
  for (size_t i = 0; i < 7; i++) {
    ort_status *status = tensor_input(api, context, i, &in[i]);
    if (status) return status;
  }
  const int64_t *x = in[0].dims, *selection = in[1].dims, *weights = in[2].dims;
  int64_t t = x[0], d = x[1], experts = selection[1], inner = in[5].rank == 4 ? in[5].dims[2] * 8 : 0;
  if (in[0].rank != 2 || in[1].rank != 2 || in[2].rank != 2 || selection[0] != t || weights[0] != t ||
      weights[1] != experts || self->top_k > experts || d % TILE || inner % TILE)
    return failure(api, ORT_INVALID_ARGUMENT, "%s: x, selection, weights, widths and top_k do not fit together", op);
  struct experts e = {.routines = self->routines, .x = in[0].data, .selection = in[1].data, .weights = in[2].data,
                      .tokens = (size_t)t, .experts = (size_t)experts, .top_k = (size_t)self->top_k,
                      .d = (size_t)d, .inner = (size_t)inner, .scale = self->scale};
  e.limit = self->limit > 0 ? self->limit : __builtin_inff();
  ort_status *status = matrix_of(api, op, &in[3], &in[4], experts, 2 * inner, d, self->block, &e.gate_up);
  if (!status) status = matrix_of(api, op, &in[5], &in[6], experts, d, inner, self->block, &e.down);
  if (!status) status = tensor_output(api, context, 0, x, 2, &e.y);
  if (status || !t || !d) return status;
  void *room = malloc(experts_size(&e));
  if (!room) return failure(api, ORT_FAIL, "%s: no memory for %zu tokens", op, e.tokens);
  struct task tasks[EXPERTS_TASKS];
  experts_plan(&e, room, tasks);
  status = do_tasks(api, context, tasks, EXPERTS_TASKS, e.bytes);
  free(room);
  return status;
}

static const char *name(const ort_op *op) { return (void)op, "Int4Experts"; }
static size_t inputs(const ort_op *op) { return (void)op, 7; }
static int input_type(const ort_op *op, size_t index) {
  static const int types[] = {ORT_FLOAT, ORT_FLOAT, ORT_FLOAT, ORT_UINT8, ORT_FLOAT16, ORT_UINT8, ORT_FLOAT16};
  return (void)op, types[index];
}

const ort_op int4_experts_op = {OP_PLAIN, .name = name, .input_count = inputs, .output_count = one_output,
                                .input_type = input_type, .create_checked = create, .compute_checked = compute};
