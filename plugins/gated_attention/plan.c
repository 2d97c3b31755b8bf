#include "plan.h"

#include <string.h>

#include "../cpu/int4.h"
#include "../cpu/lanes.h"

const struct attend_routines *const attend_routines[ISA_COUNT] = {
    [ISA_PORTABLE] = &attend_portable,
    [ISA_NEON] = &attend_portable,
#if defined(__x86_64__)
    [ISA_AVX2] = &attend_avx2,
    [ISA_AVX512] = &attend_avx512,
#endif
};

static void write(void *argument, size_t begin, size_t end) {
  const struct attending *c = argument;
  for (size_t token = begin; token < end; token++) c->routines->write(&c->a, token);
}

static void attend(void *argument, size_t begin, size_t end) {
  const struct attending *c = argument;
  c->routines->attend(&c->a, begin, end);
}

static void combine(void *argument, size_t begin, size_t end) {
  const struct attending *c = argument;
  for (size_t token = begin; token < end; token++) c->routines->combine(&c->a, token);
}

// The keys and values of a unit, page by page.
static size_t ask_pages(void *argument, size_t unit, size_t done) {
  const struct attention *a = &((const struct attending *)argument)->a;
  const struct unit *u = a->units + unit;
  struct reach r = reach_of(a, u);
  for (size_t begin = r.from, end; begin < r.to; begin = end) {
    size_t first = begin % a->page, row = page_at(a, a->sequences + u->sequence, u->group, begin);
    end = begin - first + a->page < r.to ? begin - first + a->page : r.to;
    size_t tile = first / LANES * LANES, last = first + (end - begin);
    const float *parts[] = {a->keys + row + tile * a->dim, a->values + row + first * a->dim};
    size_t rows[] = {(last + LANES - 1) / LANES * LANES - tile, end - begin};
    for (size_t i = 0; i < 2; i++) {
      size_t bytes = rows[i] * a->dim * sizeof(float);
      if (done < bytes) return ask_bytes(parts[i], bytes, done);
      done -= bytes;
    }
  }
  return 0;
}

static int shapes_fit(const struct tensor *const in[ATTENTION_INPUTS]) {
  const int64_t *q = in[Q]->dims, *cache = in[KEYS_IN]->dims;
  for (size_t i = Q; i <= GATE; i++)
    if (in[i]->rank != 2 || in[i]->dims[0] != q[0]) return 0;
  if (in[KEYS_IN]->rank != 4 || in[VALUES_IN]->rank != 4 ||
      memcmp(cache, in[VALUES_IN]->dims, sizeof in[VALUES_IN]->dims))
    return 0;
  int64_t groups = cache[1], page = cache[2], d = cache[3], heads = in[GATE]->dims[1];
  if (groups < 1 || d < LANES || d > MOST_DIM || d % LANES || page < KEYS || page % KEYS || heads % groups ||
      heads / groups > UNIT_ROWS || q[1] != heads * d || in[K]->dims[1] != groups * d || in[V]->dims[1] != groups * d)
    return 0;
  if (in[Q_GAMMA]->dims[0] != d || in[K_GAMMA]->dims[0] != d || in[FREQUENCIES]->dims[0] * 2 > d) return 0;
  return in[TABLE]->rank == 2 && in[STARTS]->rank == 1 && in[PASTS]->rank == 1 &&
         in[TABLE]->dims[0] == in[PASTS]->dims[0] && in[STARTS]->dims[0] == in[PASTS]->dims[0] + 1;
}

// Whether the sequences follow on each other and every page that a token sees is among `pages`.
static int sequences_fit(const struct attention *a, int64_t pages) {
  if (a->starts[0] != 0 || a->starts[a->sequence_count] != (int64_t)a->tokens) return 0;
  for (size_t i = 0; i < a->sequence_count; i++) {
    if (a->starts[i + 1] < a->starts[i] || a->pasts[i] < 0) return 0;
    size_t tokens = (size_t)(a->starts[i + 1] - a->starts[i]), past = (size_t)a->pasts[i];
    if (!tokens) continue;
    size_t first = seen_from(a, past) / a->page, last = (past + tokens - 1) / a->page;
    if (last >= a->table_width) return 0;
    for (size_t page = first; page <= last; page++) {
      int64_t place = a->table[i * a->table_width + page];
      if (place < 0 || place >= pages) return 0;
    }
  }
  return 1;
}

static struct sequence sequence_at(const struct attention *a, size_t i) {
  struct sequence s = {.pages = a->table + i * a->table_width, .begin = (size_t)a->starts[i],
                       .tokens = (size_t)(a->starts[i + 1] - a->starts[i]), .past = (size_t)a->pasts[i]};
  s.first_chunk = seen_from(a, s.past) / CHUNK;
  s.chunks = s.tokens ? (s.past + s.tokens - 1) / CHUNK - s.first_chunk + 1 : 0;
  return s;
}

// Few tokens with a long past: chunks are units.
static int is_split(const struct sequence *s) { return s->tokens <= SHORT && s->chunks > 1; }

static size_t parts_of(const struct attention *a, const struct sequence *s) {
  return is_split(s) ? s->chunks * s->tokens * a->heads * (a->dim + 2) : 0;
}

static size_t tokens_at_once(const struct attention *a) {
  size_t at_once = UNIT_ROWS * a->groups / a->heads;
  return at_once < 1 ? 1 : at_once;
}

ort_status *attention_of(const ort_api *api, const char *op, const struct tensor *const in[ATTENTION_INPUTS],
                         int64_t window, float eps, struct attending *c) {
  struct attention *a = &c->a;
  if (!shapes_fit(in)) return failure(api, ORT_INVALID_ARGUMENT, "%s: the inputs do not fit together", op);
  const int64_t *cache = in[KEYS_IN]->dims;
  *a = (struct attention){
      .q = in[Q]->data, .k = in[K]->data, .v = in[V]->data, .gate = in[GATE]->data,
      .q_gamma = in[Q_GAMMA]->data, .k_gamma = in[K_GAMMA]->data, .frequencies = in[FREQUENCIES]->data,
      .starts = in[STARTS]->data, .pasts = in[PASTS]->data, .table = in[TABLE]->data,
      .sequence_count = (size_t)in[PASTS]->dims[0], .table_width = (size_t)in[TABLE]->dims[1],
      .tokens = (size_t)in[Q]->dims[0], .heads = (size_t)in[GATE]->dims[1], .groups = (size_t)cache[1],
      .dim = (size_t)cache[3], .half = (size_t)in[FREQUENCIES]->dims[0], .page = (size_t)cache[2],
      .window = (size_t)window, .eps = eps,
  };
  if (!sequences_fit(a, cache[0]))
    return failure(api, ORT_INVALID_ARGUMENT, "%s: a sequence's tokens or pages are not there", op);
  size_t at_once = tokens_at_once(a);
  c->bytes = 0;
  for (size_t i = 0; i < a->sequence_count; i++) {
    struct sequence s = sequence_at(a, i);
    size_t to = s.past + s.tokens;
    a->parts += parts_of(a, &s);
    a->unit_count += (is_split(&s) ? s.chunks : 1) * a->groups * ((s.tokens + at_once - 1) / at_once);
    // Two operations an element of a key: as long as reading about half a byte.
    if (s.tokens) c->bytes += s.tokens * a->heads * (to - seen_from(a, s.past)) * a->dim / 2;
  }
  c->combined = a->parts ? a->tokens : 0;
  return NULL;
}

float *cache_at(const struct tensor *from, float *to) {
  size_t count = 1;
  for (size_t i = 0; i < from->rank; i++) count *= (size_t)from->dims[i];
  if (to != from->data) memcpy(to, from->data, count * sizeof *to);
  return to;
}

size_t attention_cuts(const struct attending *c) {
  const struct attention *a = &c->a;
  return a->sequence_count * sizeof *a->sequences + a->tokens * sizeof *a->places + a->unit_count * sizeof *a->units;
}

size_t attention_room(const struct attending *c) {
  const struct attention *a = &c->a;
  return (a->tokens * 2 * a->half + a->parts) * sizeof(float);
}

// The units of one sequence.
static struct unit *cut(const struct attention *a, size_t index, struct unit *to) {
  const struct sequence *s = a->sequences + index;
  size_t at_once = tokens_at_once(a), chunks = s->parts ? s->chunks : 1;
  for (size_t chunk = 0; chunk < chunks; chunk++)
    for (size_t group = 0; group < a->groups; group++)
      for (size_t token = 0; token < s->tokens; token += at_once) {
        size_t count = s->tokens - token < at_once ? s->tokens - token : at_once;
        *to++ = (struct unit){(uint32_t)index, (uint32_t)group, (uint32_t)token, (uint32_t)count, (uint32_t)chunk};
      }
  return to;
}

void attention_plan(struct attending *c, void *cuts, void *room, struct task tasks[ATTENTION_TASKS]) {
  struct attention *a = &c->a;
  a->sequences = cuts;
  a->places = (struct place *)(a->sequences + a->sequence_count);
  a->units = (struct unit *)(a->places + a->tokens);
  a->turns = room;
  float *parts = a->turns + a->tokens * 2 * a->half;
  struct unit *unit = a->units;
  for (size_t i = 0; i < a->sequence_count; i++) {
    struct sequence *s = a->sequences + i;
    *s = sequence_at(a, i);
    s->parts = is_split(s) ? parts : NULL;
    parts += parts_of(a, s);
    unit = cut(a, i, unit);
    for (size_t token = 0; token < s->tokens; token++) a->places[s->begin + token] = (struct place){s, s->past + token};
  }
  tasks[0] = (struct task){write, c, &a->tokens, NULL, {0}};
  tasks[1] = (struct task){attend, c, &a->unit_count, ask_pages, {0}};
  tasks[2] = (struct task){combine, c, &c->combined, NULL, {0}};
}
