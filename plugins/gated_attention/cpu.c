// GatedAttention(q [t, H d], k, v [t, G d], gate [t, H], q_gamma, k_gamma [d], frequencies [r / 2], keys, values
// [pages, G, page, d] f32, table [S, P], starts [S + 1], pasts [S] i64) -> [t, H d], keys, values as they came.
// Attributes: window (0: none), eps.
//
// Tokens starts[s] .. starts[s + 1] - 1 belong to sequence s and follow on the pasts[s] that its pages hold already;
// its positions p lie in page table[s, p / page]. Norms and rotates q and k, writes k and v into the pages, attends
// causally (in a window) and multiplies each head by the sigmoid of its gate (specification 2.4). Entries of the
// table that no token of the call sees are not looked at. The cache outputs are meant to be bound to the cache inputs'
// memory; elsewhere they are copied first. attend.h says how rows lie in a page.
#include <stdlib.h>

#include "../cpu/op.h"
#include "plan.h"

struct state {
  const ort_api *api;
  const struct attend_routines *routines;
  int64_t window;
  float eps;
};

static ort_status *create(const ort_op *op, const ort_api *api, const ort_kernel_info *info, void **kernel) {
  (void)op;
  struct state made = {.api = api};
  enum isa isa;
  ort_status *status = choose_isa(api, &isa);
  if (!status) made.routines = attend_routines[isa];
  if (!status) status = ort_attribute_int(api)(info, "window", &made.window);
  if (!status) status = ort_attribute_float(api)(info, "eps", &made.eps);
  return status ? status : keep(api, &made, sizeof made, kernel);
}

static ort_status *compute(void *kernel, ort_kernel_context *context) {
  const struct state *self = kernel;
  const ort_api *api = self->api;
  struct tensor given[ATTENTION_INPUTS];
  const struct tensor *in[ATTENTION_INPUTS];
  for (size_t i = 0; i < ATTENTION_INPUTS; i++) {
    ort_status *status = tensor_input(api, context, i, &given[i]);
    if (status) return status;
    in[i] = &given[i];
  }
  struct attending c = {.routines = self->routines};
  float *caches[2] = {NULL, NULL};
  ort_status *status = attention_of(api, "GatedAttention", in, self->window, self->eps, &c);
  if (!status) status = tensor_output(api, context, 0, in[Q]->dims, 2, &c.a.out);
  for (size_t i = 0; i < 2 && !status; i++)
    status = tensor_output(api, context, 1 + i, in[KEYS_IN]->dims, 4, &caches[i]);
  if (status) return status;
  c.a.keys = cache_at(in[KEYS_IN], caches[0]);
  c.a.values = cache_at(in[VALUES_IN], caches[1]);
  char *room = malloc(attention_cuts(&c) + attention_room(&c) + 1);
  if (!room) return failure(api, ORT_FAIL, "GatedAttention: no memory for %zu tokens", c.a.tokens);
  struct task tasks[ATTENTION_TASKS];
  attention_plan(&c, room, room + attention_cuts(&c), tasks);
  status = do_tasks(api, context, tasks, ATTENTION_TASKS, c.bytes);
  free(room);
  return status;
}

static const char *name(const ort_op *op) { return (void)op, "GatedAttention"; }
static size_t inputs(const ort_op *op) { return (void)op, ATTENTION_INPUTS; }
static size_t outputs(const ort_op *op) { return (void)op, 3; }
static int input_type(const ort_op *op, size_t index) { return (void)op, index >= TABLE ? ORT_INT64 : ORT_FLOAT; }

const ort_op gated_attention_op = {OP_PLAIN, .name = name, .input_count = inputs, .output_count = outputs,
                                   .input_type = input_type, .create_checked = create, .compute_checked = compute};
