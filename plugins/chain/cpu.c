// Chain(inputs...) -> outputs f32: the steps of a decoder, done by one set of threads without going back to the
// runtime. While a worker waits for the others it asks for the weights it will read next, so memory is kept busy
// through norms, sums and routing.
//
// Attributes: results, the values that are outputs; steps and reals, integers and numbers in the order in which
// steps take them. Values are numbered: the inputs, then what steps make, [t, width] where nothing else is said.
//   EMBED    ids, codes, scales, block                                 -> rows (code - 128) * scale of 8-bit codes
//   ROWS     index, x                                                  -> those rows of x
//   ADD      a, b                                                      -> a + b
//   NORM     x, gamma; eps                                             -> RMSNorm
//   ATTEND   the twelve inputs of GatedAttention, window; eps          -> its outputs; the caches are results
//   LINEAR   x, block, count, then count times weight, scales, N       -> the products; scales -1: fp32 weights
//   GATED    gate, up, block, weight, scales, N; limit                 -> the product of the clipped SwiGLU
//   EXPERTS  x, logits, bias, gate_up, its scales, down, its scales, block, top_k; scale, limit -> the mix; its
//            weights are the logits' sigmoid, its selection that plus the bias
//   DROP     a value that no step takes any more: others may have its memory
// Weights, limits (0: none) and results are those of Int4Linear, Int4GatedLinear and Int4Experts.
#include <stdlib.h>
#include <string.h>

#include "call.h"

static ort_status *run(struct call *c) {
  const struct state *self = c->self;
  for (size_t i = 0; i < self->inputs && !c->status; i++)
    if (!self->is_fixed[i]) c->status = tensor_input(c->api, c->context, i, &c->value[i]);
  read_steps(c);
  if (!c->status) c->status = do_tasks(c->api, c->context, c->task, c->tasks, c->bytes);
  return c->status;
}

static ort_status *compute(void *kernel, ort_kernel_context *context) {
  struct state *self = kernel;
  struct call *c = atomic_exchange(&self->spare, NULL);
  if (!c) c = call_new(self);
  if (!c) return failure(self->api, ORT_FAIL, "Chain: no memory for a call");
  call_begin(c, self, context);
  ort_status *status = run(c);
  call_end(c);
  call_free(atomic_exchange(&self->spare, c));
  return status;
}

static void destroy(void *kernel) {
  struct state *self = kernel;
  call_free(atomic_load(&self->spare));
  void *const held[] = {self->steps, self->results, self->numbers, self->fixed, self->is_fixed, self->output_of, self};
  for (size_t i = 0; i < sizeof held / sizeof *held; i++) free(held[i]);
}

// The attributes; first only how long they are.
static ort_status *attributes(struct state *s, const ort_kernel_info *info) {
  ort_status *status = ort_attribute_ints(s->api)(info, "steps", s->steps, &s->ints);
  if (!status) status = ort_attribute_ints(s->api)(info, "results", s->results, &s->outputs);
  if (!status) status = ort_attribute_floats(s->api)(info, "reals", s->numbers, &s->reals);
  return status;
}

static ort_status *fixed_inputs(struct state *s, const ort_kernel_info *info) {
  ort_status *status = NULL;
  for (size_t i = 0; i < s->inputs && !status; i++) {
    const ort_value *held = NULL;
    int fixed = 0;
    status = ort_constant_input(s->api)(info, i, &fixed, &held);
    if (status || !fixed) continue;
    s->is_fixed[i] = 1;
    status = tensor_of(s->api, held, i, &s->fixed[i]);
  }
  return status;
}

static ort_status *fill(struct state *s, const ort_kernel_info *info) {
  ort_status *status = choose_isa(s->api, &s->isa);
  if (!status) status = ort_info_input_count(s->api)(info, &s->inputs);
  if (!status) status = attributes(s, info);
  if (status) return status;
  // A step that makes something, and a task, have two integers or more.
  s->values = s->inputs + s->ints / 2;
  s->tasks = s->ints / 2;
  s->steps = calloc(s->ints + 1, sizeof *s->steps);
  s->results = calloc(s->outputs + 1, sizeof *s->results);
  s->numbers = calloc(s->reals + 1, sizeof *s->numbers);
  s->fixed = calloc(s->inputs + 1, sizeof *s->fixed);
  s->is_fixed = calloc(s->inputs + 1, sizeof *s->is_fixed);
  s->output_of = malloc((s->values + 1) * sizeof *s->output_of);
  if (!s->steps || !s->results || !s->numbers || !s->fixed || !s->is_fixed || !s->output_of)
    return failure(s->api, ORT_FAIL, "no memory for an operator");
  status = attributes(s, info);
  if (!status) status = fixed_inputs(s, info);
  memset(s->output_of, -1, s->values * sizeof *s->output_of);
  for (size_t i = 0; i < s->outputs && !status; i++)
    if (s->results[i] < (int64_t)s->inputs || s->results[i] >= (int64_t)s->values)
      status = failure(s->api, ORT_INVALID_ARGUMENT, "Chain: an output is no result");
    else
      s->output_of[s->results[i]] = (int32_t)i;
  return status;
}

static ort_status *create(const ort_op *op, const ort_api *api, const ort_kernel_info *info, void **kernel) {
  (void)op;
  struct state *made = calloc(1, sizeof *made);
  if (!made) return failure(api, ORT_FAIL, "no memory for an operator");
  made->api = api;
  ort_status *status = fill(made, info);
  if (status)
    destroy(made);
  else
    *kernel = made;
  return status;
}

static const char *name(const ort_op *op) { return (void)op, "Chain"; }
static int input_type(const ort_op *op, size_t index) { return (void)op, (void)index, ORT_ANY_TYPE; }
static int variadic(const ort_op *op, size_t index) { return (void)op, (void)index, ORT_VARIADIC; }

const ort_op chain_op = {
    .version = ORT_VERSION, .name = name, .provider = any_provider, .input_type = input_type,
    .input_count = one_output, .output_type = float_output, .output_count = one_output, .destroy = destroy,
    .input_kind = variadic, .output_kind = variadic, .input_memory = zero_of, .input_minimum = one_of,
    .input_alike = none_of, .output_minimum = one_of, .output_alike = one_of, .create_checked = create,
    .compute_checked = compute, .first_version = one_of, .last_version = newest,
};
