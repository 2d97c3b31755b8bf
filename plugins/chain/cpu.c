// Chain(inputs...) -> outputs [t, width] f32: steps between two attentions, done by one set of threads without
// going back to the runtime. While a worker waits for the others it asks for the weights it will read next, so
// memory is kept busy through norms, sums and routing.
//
// Attributes: results, the values that are outputs; steps and reals, integers and numbers in the order in which
// steps take them. Values are numbered: the inputs, then what steps make.
//   EMBED    ids, codes, scales, block                                 -> rows (code - 128) * scale of 8-bit codes
//   ROWS     index, x                                                  -> those rows of x
//   ADD      a, b                                                      -> a + b
//   NORM     x, gamma; eps                                             -> RMSNorm
//   LINEAR   x, block, count, then count times weight, scales, N       -> the products; scales -1: fp32 weights
//   GATED    gate, up, block, weight, scales, N; limit                 -> the product of the clipped SwiGLU
//   EXPERTS  x, logits, bias, gate_up, its scales, down, its scales, block, top_k; scale, limit -> the mix; its
//            weights are the logits' sigmoid, its selection that plus the bias
// Weights, limits (0: none) and results are those of Int4Linear, Int4GatedLinear and Int4Experts.
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "call.h"

static void run(struct call *c) {
  const struct state *self = c->self;
  c->values = self->inputs;
  for (size_t i = 0; i < self->inputs && !c->status; i++)
    if (!self->is_fixed[i]) c->status = tensor_input(c->api, c->context, i, &c->value[i]);
  memset(c->output_of, -1, sizeof c->output_of);
  for (size_t i = 0; i < self->outputs; i++) c->output_of[self->results[i]] = (int16_t)i;
  read_steps(c);
  if (!c->status) c->status = do_tasks(c->api, c->context, c->task, c->tasks, c->bytes);
}

static ort_status *compute(void *kernel, ort_kernel_context *context) {
  const struct state *self = kernel;
  struct call c;
  memset(&c, 0, offsetof(struct call, output_of));
  c.self = self;
  c.api = self->api;
  c.context = context;
  c.at = self->steps;
  c.end = self->steps + self->ints;
  c.number = self->numbers;
  c.last_number = self->numbers + self->reals;
  run(&c);
  for (size_t i = 0; i < c.kept; i++) free(c.room[i]);
  for (size_t i = 0; i < c.mixes; i++) experts_end(&c.experts[i]);
  return c.status;
}

static ort_status *fixed_inputs(const ort_api *api, const ort_kernel_info *info, struct state *out) {
  ort_status *status = ort_info_input_count(api)(info, &out->inputs);
  if (!status && out->inputs > MOST_VALUES)
    status = failure(api, ORT_INVALID_ARGUMENT, "Chain: it has too many inputs");
  for (size_t i = 0; i < out->inputs && !status; i++) {
    const ort_value *held = NULL;
    int fixed = 0;
    status = ort_constant_input(api)(info, i, &fixed, &held);
    if (status || !fixed) continue;
    out->is_fixed[i] = 1;
    status = tensor_of(api, held, i, &out->fixed[i]);
  }
  return status;
}

static ort_status *create(const ort_op *op, const ort_api *api, const ort_kernel_info *info, void **kernel) {
  (void)op;
  struct state made = {.api = api, .ints = MOST_INTS, .reals = MOST_REALS, .outputs = MOST_VALUES};
  enum isa isa;
  ort_status *status = choose_isa(api, &isa);
  if (!status) made.routines = int4_routines[isa];
  if (!status) status = ort_attribute_ints(api)(info, "steps", made.steps, &made.ints);
  if (!status) status = ort_attribute_ints(api)(info, "results", made.results, &made.outputs);
  if (!status) status = ort_attribute_floats(api)(info, "reals", made.numbers, &made.reals);
  if (!status) status = fixed_inputs(api, info, &made);
  for (size_t i = 0; i < made.outputs && !status; i++)
    if (made.results[i] < (int64_t)made.inputs || made.results[i] >= MOST_VALUES)
      status = failure(api, ORT_INVALID_ARGUMENT, "Chain: an output is no result");
  return status ? status : keep(api, &made, sizeof made, kernel);
}

static const char *name(const ort_op *op) { return (void)op, "Chain"; }
static int input_type(const ort_op *op, size_t index) { return (void)op, (void)index, ORT_ANY_TYPE; }
static int variadic(const ort_op *op, size_t index) { return (void)op, (void)index, ORT_VARIADIC; }

const ort_op chain_op = {OP_COMMON, .name = name, .input_count = one_output, .output_count = one_output,
                         .input_kind = variadic, .input_alike = none_of, .output_kind = variadic,
                         .input_type = input_type, .create_checked = create, .compute_checked = compute};
