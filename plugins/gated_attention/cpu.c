// GatedAttention(q [t, H d], k, v [t, G d], gate [t, H], q_gamma, k_gamma [d], frequencies [r / 2], past_keys,
// past_values [1, G, C, d] f32, past_length [1] i64) -> [t, H d], keys, values [1, G, C, d] f32.
// Attributes: window (0: none), eps.
//
// Norms and rotates q and k, writes k and v into the cache, attends causally (in a window) and multiplies each
// head by the sigmoid of its gate (specification 2.4). The cache outputs are meant to be bound to the cache
// inputs' memory; elsewhere they are copied first. attend.h says how rows lie in them.
#include <stdlib.h>
#include <string.h>

#include "../cpu/lanes.h"
#include "../cpu/op.h"
#include "../cpu/work.h"
#include "attend.h"

struct state {
  const ort_api *api;
  const struct attend_routines *routines;
  int64_t window;
  float eps;
};

struct call {
  const struct attend_routines *routines;
  struct attention a;
};

static void write(void *argument, size_t begin, size_t end) {
  const struct call *c = argument;
  for (size_t token = begin; token < end; token++) c->routines->write(&c->a, token);
}

static void attend(void *argument, size_t begin, size_t end) {
  const struct call *c = argument;
  for (size_t unit = begin; unit < end; unit++) c->routines->attend(&c->a, unit);
}

static void combine(void *argument, size_t begin, size_t end) {
  const struct call *c = argument;
  for (size_t token = begin; token < end; token++) c->routines->combine(&c->a, token);
}

static ort_status *create(const ort_op *op, const ort_api *api, const ort_kernel_info *info, void **kernel) {
  static const struct attend_routines *const routines[ISA_COUNT] = {
      [ISA_PORTABLE] = &attend_portable,
      [ISA_NEON] = &attend_portable,
#if defined(__x86_64__)
      [ISA_AVX2] = &attend_avx2,
      [ISA_AVX512] = &attend_avx512,
#endif
  };
  (void)op;
  struct state made = {.api = api};
  enum isa isa;
  ort_status *status = choose_isa(api, &isa);
  if (!status) made.routines = routines[isa];
  if (!status) status = ort_attribute_int(api)(info, "window", &made.window);
  if (!status) status = ort_attribute_float(api)(info, "eps", &made.eps);
  return status ? status : keep(api, &made, sizeof made, kernel);
}

static int fits(const struct tensor *in, int64_t past, int64_t window) {
  const int64_t *q = in[0].dims, *cache = in[7].dims;
  for (size_t i = 0; i < 4; i++)
    if (in[i].rank != 2 || in[i].dims[0] != q[0]) return 0;
  if (in[7].rank != 4 || in[8].rank != 4 || memcmp(cache, in[8].dims, sizeof in[8].dims) || cache[0] != 1) return 0;
  int64_t t = q[0], groups = cache[1], capacity = cache[2], d = cache[3], heads = in[3].dims[1];
  if (groups < 1 || d < LANES || d > MOST_DIM || d % LANES || capacity % LANES || heads % groups ||
      heads / groups > ROWS || q[1] != heads * d || in[1].dims[1] != groups * d || in[2].dims[1] != groups * d)
    return 0;
  if (in[4].dims[0] != d || in[5].dims[0] != d || in[6].dims[0] * 2 > d) return 0;
  // What the call's first token sees must still be there when its last has been written.
  return past >= 0 && (past + t <= capacity || (window && t + window - 1 <= capacity));
}

static ort_status *compute(void *kernel, ort_kernel_context *context) {
  const struct state *self = kernel;
  const ort_api *api = self->api;
  struct tensor in[10];
  for (size_t i = 0; i < 10; i++) {
    ort_status *status = tensor_input(api, context, i, &in[i]);
    if (status) return status;
  }
  int64_t past = *(const int64_t *)in[9].data;
  if (!fits(in, past, self->window))
    return failure(api, ORT_INVALID_ARGUMENT, "GatedAttention: the inputs do not fit together, or the caches are full");
  const int64_t *cache = in[7].dims;
  struct call c = {.routines = self->routines};
  struct attention *a = &c.a;
  *a = (struct attention){
      .q = in[0].data, .k = in[1].data, .v = in[2].data, .gate = in[3].data,
      .q_gamma = in[4].data, .k_gamma = in[5].data, .frequencies = in[6].data,
      .tokens = (size_t)in[0].dims[0], .heads = (size_t)in[3].dims[1], .groups = (size_t)cache[1],
      .dim = (size_t)cache[3], .half = (size_t)in[6].dims[0], .capacity = (size_t)cache[2],
      .window = (size_t)self->window, .past = (size_t)past, .chunks = 1, .eps = self->eps,
  };
  ort_status *status = tensor_output(api, context, 0, in[0].dims, 2, &a->out);
  if (!status) status = tensor_output(api, context, 1, cache, 4, &a->keys);
  if (!status) status = tensor_output(api, context, 2, cache, 4, &a->values);
  if (status) return status;
  size_t cache_bytes = a->groups * a->capacity * a->dim * sizeof(float);
  if (a->keys != in[7].data) memcpy(a->keys, in[7].data, cache_bytes);
  if (a->values != in[8].data) memcpy(a->values, in[8].data, cache_bytes);
  if (!a->tokens) return NULL;

  size_t from = seen_from(a, a->past), seen = a->past + a->tokens - from;
  if (a->tokens <= SHORT) {
    a->first_chunk = from / CHUNK;
    a->chunks = (a->past + a->tokens - 1) / CHUNK - a->first_chunk + 1;
  }
  size_t turns = a->tokens * 2 * a->half;
  size_t parts = a->chunks > 1 ? a->chunks * a->tokens * a->heads * (a->dim + 2) : 0;
  float *room = malloc((turns + parts) * sizeof(float) + 1);
  if (!room) return failure(api, ORT_FAIL, "GatedAttention: no memory for %zu tokens", a->tokens);
  a->turns = room;
  a->parts = room + turns;
  const struct phase phases[] = {{write, a->tokens}, {attend, attend_units(a)}, {combine, a->tokens}};
  // Two operations an element of a key: as long as reading about half a byte.
  size_t bytes = a->tokens * a->heads * seen * a->dim / 2;
  status = do_phases(api, context, phases, a->chunks > 1 ? 3 : 2, bytes, &c);
  free(room);
  return status;
}

static const char *name(const ort_op *op) { return (void)op, "GatedAttention"; }
static size_t inputs(const ort_op *op) { return (void)op, 10; }
static size_t outputs(const ort_op *op) { return (void)op, 3; }
static int input_type(const ort_op *op, size_t index) { return (void)op, index == 9 ? ORT_INT64 : ORT_FLOAT; }

const ort_op gated_attention_op = {OP_PLAIN, .name = name, .input_count = inputs, .output_count = outputs,
                                   .input_type = input_type, .create_checked = create, .compute_checked = compute};
