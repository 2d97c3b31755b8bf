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

enum { Q, K, V, GATE, Q_GAMMA, K_GAMMA, FREQUENCIES, KEYS_IN, VALUES_IN, TABLE, STARTS, PASTS, INPUTS };

static void write(void *argument, size_t begin, size_t end) {
  const struct call *c = argument;
  for (size_t token = begin; token < end; token++) c->routines->write(&c->a, token);
}

static void attend(void *argument, size_t begin, size_t end) {
  const struct call *c = argument;
  c->routines->attend(&c->a, begin, end);
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

static int shapes_fit(const struct tensor *in) {
  const int64_t *q = in[Q].dims, *cache = in[KEYS_IN].dims;
  for (size_t i = Q; i <= GATE; i++)
    if (in[i].rank != 2 || in[i].dims[0] != q[0]) return 0;
  if (in[KEYS_IN].rank != 4 || in[VALUES_IN].rank != 4 || memcmp(cache, in[VALUES_IN].dims, sizeof in[VALUES_IN].dims))
    return 0;
  int64_t groups = cache[1], page = cache[2], d = cache[3], heads = in[GATE].dims[1];
  if (groups < 1 || d < LANES || d > MOST_DIM || d % LANES || page < KEYS || page % KEYS || heads % groups ||
      heads / groups > ROWS || q[1] != heads * d || in[K].dims[1] != groups * d || in[V].dims[1] != groups * d)
    return 0;
  if (in[Q_GAMMA].dims[0] != d || in[K_GAMMA].dims[0] != d || in[FREQUENCIES].dims[0] * 2 > d) return 0;
  return in[TABLE].rank == 2 && in[STARTS].rank == 1 && in[PASTS].rank == 1 &&
         in[TABLE].dims[0] == in[PASTS].dims[0] && in[STARTS].dims[0] == in[PASTS].dims[0] + 1;
}

// Fills in the sequences, as far as they follow on each other and every page that a token sees is there.
static int sequences_fit(const struct tensor *in, const struct attention *a) {
  size_t count = (size_t)in[PASTS].dims[0], width = (size_t)in[TABLE].dims[1];
  const int64_t *starts = in[STARTS].data, *pasts = in[PASTS].data, *table = in[TABLE].data;
  if (starts[0] != 0 || starts[count] != (int64_t)a->tokens) return 0;
  for (size_t i = 0; i < count; i++) {
    if (starts[i + 1] < starts[i] || pasts[i] < 0) return 0;
    size_t begin = (size_t)starts[i], tokens = (size_t)(starts[i + 1] - starts[i]), past = (size_t)pasts[i];
    a->sequences[i] = (struct sequence){.pages = table + i * width, .begin = begin, .tokens = tokens, .past = past};
    if (!tokens) continue;
    size_t first = seen_from(a, past) / a->page, last = (past + tokens - 1) / a->page;
    if (last >= width) return 0;
    for (size_t page = first; page <= last; page++)
      if (table[i * width + page] < 0 || table[i * width + page] >= in[KEYS_IN].dims[0]) return 0;
  }
  return 1;
}

static size_t tokens_at_once(const struct attention *a) {
  size_t at_once = ROWS * a->groups / a->heads;
  return at_once < 1 ? 1 : at_once;
}

// Cuts the call into units; without `a->units` only counts them. Gives back how many floats their parts take.
static size_t cut(const struct attention *a, size_t sequences, float *parts, size_t *units, size_t *bytes) {
  size_t room = 0, at_once = tokens_at_once(a);
  *units = *bytes = 0;
  for (size_t i = 0; i < sequences; i++) {
    struct sequence *s = a->sequences + i;
    if (!s->tokens) continue;
    size_t from = seen_from(a, s->past), to = s->past + s->tokens;
    s->first_chunk = from / CHUNK;
    s->chunks = (to - 1) / CHUNK - s->first_chunk + 1;
    int split = s->tokens <= SHORT && s->chunks > 1;
    s->parts = split ? parts + room : NULL;
    if (split) room += s->chunks * s->tokens * a->heads * (a->dim + 2);
    for (size_t chunk = 0; chunk < (split ? s->chunks : 1); chunk++)
      for (size_t group = 0; group < a->groups; group++)
        for (size_t token = 0; token < s->tokens; token += at_once, ++*units) {
          size_t count = s->tokens - token < at_once ? s->tokens - token : at_once;
          if (a->units)
            a->units[*units] = (struct unit){(uint32_t)i, (uint32_t)group, (uint32_t)token, (uint32_t)count,
                                             (uint32_t)chunk};
        }
    for (size_t token = 0; a->units && token < s->tokens; token++)
      a->places[s->begin + token] = (struct place){s, s->past + token};
    // Two operations an element of a key: as long as reading about half a byte.
    *bytes += s->tokens * a->heads * (to - from) * a->dim / 2;
  }
  return room;
}

static ort_status *run(const struct state *self, ort_kernel_context *context, const struct tensor *in, struct call *c) {
  const ort_api *api = self->api;
  struct attention *a = &c->a;
  size_t sequences = (size_t)in[PASTS].dims[0], units, bytes;
  a->sequences = malloc(sequences * sizeof *a->sequences + 1);
  if (!a->sequences) return failure(api, ORT_FAIL, "GatedAttention: no memory");
  if (!sequences_fit(in, a)) {
    free(a->sequences);
    return failure(api, ORT_INVALID_ARGUMENT, "GatedAttention: a sequence's tokens or pages are not there");
  }
  size_t parts = cut(a, sequences, NULL, &units, &bytes), turns = a->tokens * 2 * a->half;
  char *room = malloc(a->tokens * sizeof *a->places + units * sizeof *a->units + (turns + parts) * sizeof(float) + 1);
  if (!room) {
    free(a->sequences);
    return failure(api, ORT_FAIL, "GatedAttention: no memory for %zu tokens", a->tokens);
  }
  a->places = (struct place *)room;
  a->units = (struct unit *)(a->places + a->tokens);
  a->turns = (float *)(a->units + units);
  cut(a, sequences, a->turns + turns, &units, &bytes);
  const struct phase phases[] = {{write, a->tokens}, {attend, units}, {combine, a->tokens}};
  ort_status *status = do_phases(api, context, phases, parts ? 3 : 2, bytes, c);
  free(room);
  free(a->sequences);
  return status;
}

static ort_status *compute(void *kernel, ort_kernel_context *context) {
  const struct state *self = kernel;
  const ort_api *api = self->api;
  struct tensor in[INPUTS];
  for (size_t i = 0; i < INPUTS; i++) {
    ort_status *status = tensor_input(api, context, i, &in[i]);
    if (status) return status;
  }
  if (!shapes_fit(in)) return failure(api, ORT_INVALID_ARGUMENT, "GatedAttention: the inputs do not fit together");
  const int64_t *cache = in[KEYS_IN].dims;
  struct call c = {.routines = self->routines};
  struct attention *a = &c.a;
  *a = (struct attention){
      .q = in[Q].data, .k = in[K].data, .v = in[V].data, .gate = in[GATE].data,
      .q_gamma = in[Q_GAMMA].data, .k_gamma = in[K_GAMMA].data, .frequencies = in[FREQUENCIES].data,
      .tokens = (size_t)in[Q].dims[0], .heads = (size_t)in[GATE].dims[1], .groups = (size_t)cache[1],
      .dim = (size_t)cache[3], .half = (size_t)in[FREQUENCIES].dims[0], .page = (size_t)cache[2],
      .window = (size_t)self->window, .eps = self->eps,
  };
  ort_status *status = tensor_output(api, context, 0, in[Q].dims, 2, &a->out);
  if (!status) status = tensor_output(api, context, 1, cache, 4, &a->keys);
  if (!status) status = tensor_output(api, context, 2, cache, 4, &a->values);
  if (status) return status;
  size_t cache_bytes = (size_t)(cache[0] * cache[1] * cache[2] * cache[3]) * sizeof(float);
  if (a->keys != in[KEYS_IN].data) memcpy(a->keys, in[KEYS_IN].data, cache_bytes);
  if (a->values != in[VALUES_IN].data) memcpy(a->values, in[VALUES_IN].data, cache_bytes);
  return run(self, context, in, &c);
}

static const char *name(const ort_op *op) { return (void)op, "GatedAttention"; }
static size_t inputs(const ort_op *op) { return (void)op, INPUTS; }
static size_t outputs(const ort_op *op) { return (void)op, 3; }
static int input_type(const ort_op *op, size_t index) { return (void)op, index >= TABLE ? ORT_INT64 : ORT_FLOAT; }

const ort_op gated_attention_op = {OP_PLAIN, .name = name, .input_count = inputs, .output_count = outputs,
                                   .input_type = input_type, .create_checked = create, .compute_checked = compute};
