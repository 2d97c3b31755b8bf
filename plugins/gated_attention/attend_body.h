// The routines of attend.h, written once and compiled for each instruction set.
//
// The file that includes this one defines
//   SCORE_ROWS, SCORE_TILES  the register tile of scores: rows by tiles of keys
//   MIX_ROWS, MIX_VECTORS    that of weighted values: rows by vectors of a head
//   ROUTINES                 the name of the table
#include <math.h>

#include "../cpu/lanes.h"
#include "attend.h"

static const float NOTHING = -1e30f; // a maximum over no keys: finite, so that differences are

// RMS norm and half-split rotation of one head (specification 2.2, 2.4), times `factor`.
INLINE void turn(const struct attention *a, const float *x, const float *gamma, const float *turns, float factor,
                 float *y) {
  lanes_f squares = {0};
  for (size_t i = 0; i < a->dim; i += LANES) squares = fma_lanes(load(x + i), load(x + i), squares);
  float inverse = 1.0f / sqrtf(sum_of(squares) / (float)a->dim + a->eps);
  for (size_t i = 0; i < a->dim; i += LANES) store(y + i, load(x + i) * all(inverse) * load(gamma + i));
  const float *sines = turns + a->half;
  float *upper = y + a->half;
  size_t i = 0;
  for (; i + LANES <= a->half; i += LANES) {
    lanes_f low = load(y + i), high = load(upper + i), c = load(turns + i), s = load(sines + i);
    store(y + i, low * c - high * s);
    store(upper + i, high * c + low * s);
  }
  for (; i < a->half; i++) {
    float low = y[i], high = upper[i];
    y[i] = low * turns[i] - high * sines[i];
    upper[i] = high * turns[i] + low * sines[i];
  }
  for (i = 0; i < a->dim; i += LANES) store(y + i, load(y + i) * all(factor));
}

static void write(const struct attention *a, size_t token) {
  const struct place *at = a->places + token;
  size_t row = at->position % a->page;
  float *turns = a->turns + token * 2 * a->half, key[MOST_DIM];
  for (size_t i = 0; i < a->half; i++) {
    float angle = (float)at->position * a->frequencies[i];
    turns[i] = cosf(angle);
    turns[i + a->half] = sinf(angle);
  }
  for (size_t g = 0; g < a->groups; g++) {
    size_t from = (token * a->groups + g) * a->dim, page = page_at(a, at->sequence, g, at->position);
    turn(a, a->k + from, a->k_gamma, turns, 1.0f, key);
    float *column = a->keys + page + row / LANES * LANES * a->dim + row % LANES;
    for (size_t i = 0; i < a->dim; i++) column[i * LANES] = key[i];
    memcpy(a->values + page + row * a->dim, a->v + from, a->dim * sizeof(float));
  }
}

// Scores of `rows` rows with `tiles` tiles of keys: s[row][16 * tile + lane].
INLINE void score(size_t rows, size_t tiles, size_t dim, const float *q, const float *const *keys, float *s) {
  lanes_f sum[SCORE_ROWS][SCORE_TILES] = {0};
  for (size_t i = 0; i < dim; i++) {
    lanes_f key[SCORE_TILES];
    UNROLL for (size_t k = 0; k < tiles; k++) key[k] = load(keys[k] + i * LANES);
    UNROLL for (size_t r = 0; r < rows; r++)
      UNROLL for (size_t k = 0; k < tiles; k++) sum[r][k] = fma_lanes(all(q[r * dim + i]), key[k], sum[r][k]);
  }
  UNROLL for (size_t r = 0; r < rows; r++)
    UNROLL for (size_t k = 0; k < tiles; k++) store(s + r * KEYS + k * LANES, sum[r][k]);
}

INLINE void score_rows(size_t rows, size_t tiles, size_t dim, const float *q, const float *const *keys, float *s) {
  size_t r = 0;
  for (; r + SCORE_ROWS <= rows; r += SCORE_ROWS) score(SCORE_ROWS, tiles, dim, q + r * dim, keys, s + r * KEYS);
  for (; r < rows; r++) score(1, tiles, dim, q + r * dim, keys, s + r * KEYS);
}

// The tiles first .. end - 1 of a block.
static void scores(size_t rows, size_t first, size_t end, size_t dim, const float *q, const float *const *keys,
                   float *s) {
  size_t k = first;
  for (; k + SCORE_TILES <= end; k += SCORE_TILES)
    score_rows(rows, SCORE_TILES, dim, q, keys + k, s + k * LANES);
  for (; k < end; k++) score_rows(rows, 1, dim, q, keys + k, s + k * LANES);
}

// acc[row] += weights[row][i] * value i, for `count` values and some vectors of the head.
INLINE void mix(size_t rows, size_t vectors, size_t dim, const float *weights, const float *values, size_t count,
                float *acc) {
  lanes_f sum[MIX_ROWS][MIX_VECTORS];
  UNROLL for (size_t r = 0; r < rows; r++)
    UNROLL for (size_t v = 0; v < vectors; v++) sum[r][v] = load(acc + r * dim + v * LANES);
  for (size_t i = 0; i < count; i++, values += dim) {
    lanes_f value[MIX_VECTORS];
    UNROLL for (size_t v = 0; v < vectors; v++) value[v] = load(values + v * LANES);
    UNROLL for (size_t r = 0; r < rows; r++)
      UNROLL for (size_t v = 0; v < vectors; v++)
        sum[r][v] = fma_lanes(all(weights[r * KEYS + i]), value[v], sum[r][v]);
  }
  UNROLL for (size_t r = 0; r < rows; r++)
    UNROLL for (size_t v = 0; v < vectors; v++) store(acc + r * dim + v * LANES, sum[r][v]);
}

static void mix_all(size_t rows, size_t dim, const float *weights, const float *values, size_t count, float *acc) {
  size_t r = 0, wide = dim / (MIX_VECTORS * LANES) * (MIX_VECTORS * LANES);
  for (; r + MIX_ROWS <= rows; r += MIX_ROWS) {
    for (size_t c = 0; c < wide; c += MIX_VECTORS * LANES)
      mix(MIX_ROWS, MIX_VECTORS, dim, weights + r * KEYS, values + c, count, acc + r * dim + c);
    for (size_t c = wide; c < dim; c += LANES)
      mix(MIX_ROWS, 1, dim, weights + r * KEYS, values + c, count, acc + r * dim + c);
  }
  for (; r < rows; r++)
    for (size_t c = 0; c < dim; c += LANES) mix(1, 1, dim, weights + r * KEYS, values + c, count, acc + r * dim + c);
}

// Turns a row's scores into weights relative to the greatest so far, and what was added before to the same.
// Only begin .. end - 1 are the row's; the other scores may be anything, NaN included, and get weight 0.
INLINE void soften(float *s, size_t begin, size_t end, float *most, lanes_f *sum, float *acc, size_t dim) {
  const lanes_i lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  lanes_f v[KEYS / LANES], high = all(NOTHING);
  lanes_i own[KEYS / LANES];
  UNROLL for (size_t k = 0; k < KEYS / LANES; k++) {
    lanes_i at = lane + (int32_t)(k * LANES);
    own[k] = (at >= (int32_t)begin) & (at < (int32_t)end);
    v[k] = pick(own[k], load(s + k * LANES), all(NOTHING));
    high = pick(v[k] > high, v[k], high);
  }
  float part[LANES], greatest = *most;
  store(part, high);
  for (size_t i = 0; i < LANES; i++) greatest = part[i] > greatest ? part[i] : greatest;
  if (greatest > *most) {
    lanes_f less = exponential(all(*most - greatest));
    *sum *= less;
    for (size_t i = 0; i < dim; i += LANES) store(acc + i, load(acc + i) * less);
    *most = greatest;
  }
  UNROLL for (size_t k = 0; k < KEYS / LANES; k++) {
    lanes_f weight = pick(own[k], exponential(v[k] - greatest), all(0));
    *sum += weight;
    store(s + k * LANES, weight);
  }
}

// Asks for a block's keys and values, which are read once a token and lie in no cache until then.
static void ask(const struct attention *a, const struct unit *u, size_t block, size_t from, size_t to) {
  size_t begin = block < from ? from / LANES * LANES : block, end = to - block < KEYS ? to : block + KEYS;
  size_t page = page_at(a, a->sequences + u->sequence, u->group, block);
  for (size_t tile = begin; tile < end; tile += LANES) {
    size_t row = page + tile % a->page * a->dim, filled = end - tile < LANES ? end - tile : LANES;
    for (size_t i = 0; i < a->dim; i++) __builtin_prefetch(a->keys + row + i * LANES, 0, 2);
    for (size_t i = 0; i < filled * a->dim; i += LANES) __builtin_prefetch(a->values + row + i, 0, 2);
  }
}

static void ask_first(const struct attention *a, const struct unit *u) {
  struct reach r = reach_of(a, u);
  if (r.from < r.to) ask(a, u, r.from / KEYS * KEYS, r.from, r.to);
}

static void finish(const struct attention *a, size_t token, size_t head, float sum, const float *acc) {
  float factor = sigmoid(all(a->gate[token * a->heads + head]))[0] / sum;
  float *out = a->out + (token * a->heads + head) * a->dim;
  for (size_t i = 0; i < a->dim; i += LANES) store(out + i, load(acc + i) * all(factor));
}

// Adds a chunk to those before it. One in which the row sees nothing changes no bit.
INLINE void merge(float *most, float *sum, float *acc, float its_most, float its_sum, const float *its, size_t dim) {
  float high = its_most > *most ? its_most : *most;
  lanes_f keep = exponential(all(*most - high)), weight = exponential(all(its_most - high));
  *most = high;
  *sum = __builtin_fmaf(weight[0], its_sum, keep[0] * *sum);
  for (size_t i = 0; i < dim; i += LANES) store(acc + i, fma_lanes(weight, load(its + i), keep * load(acc + i)));
}

// Sums over positions from .. to - 1, all of one chunk: maxima, sums and weighted values of a unit's rows.
static void sum_chunk(const struct attention *a, const struct unit *u, const struct unit *next, size_t from, size_t to,
                      size_t end, const float *q, float *most, float *sums, float *acc) {
  const struct sequence *sequence = a->sequences + u->sequence;
  size_t dim = a->dim, per = a->heads / a->groups, rows = u->count * per, first = sequence->past + u->token;
  float s[UNIT_ROWS * KEYS];
  lanes_f sum[UNIT_ROWS];
  for (size_t r = 0; r < rows; r++) {
    most[r] = NOTHING;
    sum[r] = all(0);
  }
  memset(acc, 0, rows * dim * sizeof *acc);
  for (size_t block = from / KEYS * KEYS; block < to; block += KEYS) {
    if (block + KEYS < end) ask(a, u, block + KEYS, from, end);
    else if (next) ask_first(a, next);
    size_t page = page_at(a, sequence, u->group, block), row = block % a->page;
    const float *keys[KEYS / LANES];
    for (size_t k = 0; k < KEYS / LANES; k++) keys[k] = a->keys + page + (row + k * LANES) * dim;
    size_t first_tile = from < block ? 0 : (from - block) / LANES;
    size_t end_tile = to - block < KEYS ? (to - block + LANES - 1) / LANES : KEYS / LANES;
    scores(rows, first_tile, end_tile, dim, q, keys, s);
    for (size_t r = 0; r < rows; r++) {
      size_t position = first + r / per, begin = seen_from(a, position), stop = position + 1;
      begin = begin < from ? from : begin;
      stop = stop > to ? to : stop;
      begin = begin < block ? 0 : begin - block < KEYS ? begin - block : KEYS;
      stop = stop < block ? 0 : stop - block < KEYS ? stop - block : KEYS;
      if (begin < stop) soften(s + r * KEYS, begin, stop, most + r, sum + r, acc + r * dim, dim);
      else memset(s + r * KEYS, 0, KEYS * sizeof *s);
    }
    // Only rows that some query sees are read as values: what lies in the others must not count, even times 0.
    size_t begin = from > block ? from - block : 0, stop = to - block < KEYS ? to - block : KEYS;
    mix_all(rows, dim, s + begin, a->values + page + (row + begin) * dim, stop - begin, acc);
  }
  for (size_t r = 0; r < rows; r++) sums[r] = sum_of(sum[r]);
}

static void attend_unit(const struct attention *a, const struct unit *u, const struct unit *next) {
  const struct sequence *sequence = a->sequences + u->sequence;
  size_t dim = a->dim, per = a->heads / a->groups, rows = u->count * per;
  size_t token = sequence->begin + u->token, head = u->group * per;
  float q[UNIT_ROWS * MOST_DIM], acc[UNIT_ROWS * MOST_DIM], most[UNIT_ROWS], sums[UNIT_ROWS];
  for (size_t r = 0; r < rows; r++) {
    size_t t = token + r / per;
    turn(a, a->q + (t * a->heads + head + r % per) * dim, a->q_gamma, a->turns + t * 2 * a->half,
         1.0f / sqrtf((float)dim), q + r * dim);
  }
  struct reach reach = reach_of(a, u);
  for (size_t c = 0; c < reach.chunks; c++) {
    size_t begin = (reach.chunk + c) * CHUNK, end = begin + CHUNK;
    begin = begin < reach.from ? reach.from : begin;
    end = end < reach.to ? end : reach.to;
    if (!c) {
      sum_chunk(a, u, next, begin, end, reach.to, q, most, sums, acc);
      continue;
    }
    float more[UNIT_ROWS * MOST_DIM], its_most[UNIT_ROWS], its_sums[UNIT_ROWS];
    sum_chunk(a, u, next, begin, end, reach.to, q, its_most, its_sums, more);
    for (size_t r = 0; r < rows; r++)
      merge(most + r, sums + r, acc + r * dim, its_most[r], its_sums[r], more + r * dim, dim);
  }
  for (size_t r = 0; r < rows; r++) {
    size_t t = u->token + r / per;
    if (!sequence->parts) {
      finish(a, sequence->begin + t, head + r % per, sums[r], acc + r * dim);
    } else {
      float *part =
          sequence->parts + ((u->chunk * sequence->tokens + t) * a->heads + head + r % per) * (dim + 2);
      part[0] = most[r];
      part[1] = sums[r];
      memcpy(part + 2, acc + r * dim, dim * sizeof *acc);
    }
  }
}

static void attend(const struct attention *a, size_t begin, size_t end) {
  if (begin < end) ask_first(a, a->units + begin);
  for (size_t unit = begin; unit < end; unit++)
    attend_unit(a, a->units + unit, unit + 1 < end ? a->units + unit + 1 : NULL);
}

static void combine(const struct attention *a, size_t token) {
  const struct sequence *s = a->places[token].sequence;
  if (!s->parts) return;
  size_t dim = a->dim, step = s->tokens * a->heads * (dim + 2);
  for (size_t head = 0; head < a->heads; head++) {
    const float *part = s->parts + ((token - s->begin) * a->heads + head) * (dim + 2);
    float most = part[0], sum = part[1], acc[MOST_DIM];
    memcpy(acc, part + 2, dim * sizeof *acc);
    for (size_t c = 1; c < s->chunks; c++) {
      part += step;
      merge(&most, &sum, acc, part[0], part[1], part + 2, dim);
    }
    finish(a, token, head, sum, acc);
  }
}

const struct attend_routines ROUTINES = {write, attend, combine};
