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
  size_t row = (a->past + token) % a->capacity;
  float *turns = a->turns + token * 2 * a->half, key[MOST_DIM];
  for (size_t i = 0; i < a->half; i++) {
    float angle = (float)(a->past + token) * a->frequencies[i];
    turns[i] = cosf(angle);
    turns[i + a->half] = sinf(angle);
  }
  for (size_t g = 0; g < a->groups; g++) {
    size_t from = (token * a->groups + g) * a->dim;
    turn(a, a->k + from, a->k_gamma, turns, 1.0f, key);
    float *column = a->keys + (g * a->capacity + row / LANES * LANES) * a->dim + row % LANES;
    for (size_t i = 0; i < a->dim; i++) column[i * LANES] = key[i];
    memcpy(a->values + (g * a->capacity + row) * a->dim, a->v + from, a->dim * sizeof(float));
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
static void ask(const struct attention *a, size_t group, size_t block, size_t from, size_t to) {
  size_t begin = block < from ? from / LANES * LANES : block, end = to - block < KEYS ? to : block + KEYS;
  for (size_t tile = begin; tile < end; tile += LANES) {
    size_t row = group * a->capacity + tile % a->capacity, filled = end - tile < LANES ? end - tile : LANES;
    for (size_t i = 0; i < a->dim; i++) __builtin_prefetch(a->keys + row * a->dim + i * LANES, 0, 2);
    for (size_t i = 0; i < filled * a->dim; i += LANES) __builtin_prefetch(a->values + row * a->dim + i, 0, 2);
  }
}

static void finish(const struct attention *a, size_t token, size_t head, float sum, const float *acc) {
  float factor = sigmoid(all(a->gate[token * a->heads + head]))[0] / sum;
  float *out = a->out + (token * a->heads + head) * a->dim;
  for (size_t i = 0; i < a->dim; i += LANES) store(out + i, load(acc + i) * all(factor));
}

static void attend(const struct attention *a, size_t unit) {
  size_t dim = a->dim, per = a->heads / a->groups, blocks = token_blocks(a);
  size_t token = unit % blocks * tokens_at_once(a), group = unit / blocks % a->groups;
  size_t chunk = unit / blocks / a->groups;
  size_t count = a->tokens - token < tokens_at_once(a) ? a->tokens - token : tokens_at_once(a);
  size_t rows = count * per, first = a->past + token, last = first + count - 1;
  size_t from = seen_from(a, first), to = last + 1; // positions that some row sees
  if (a->chunks > 1) {
    size_t begin = (a->first_chunk + chunk) * CHUNK;
    from = from > begin ? from : begin;
    to = to < begin + CHUNK ? to : begin + CHUNK;
  }

  if (!group) ask(a, 0, from / KEYS * KEYS, from, to);
  float q[ROWS * MOST_DIM], acc[ROWS * MOST_DIM], s[ROWS * KEYS], most[ROWS];
  lanes_f sum[ROWS];
  for (size_t r = 0; r < rows; r++) {
    size_t t = token + r / per, head = group * per + r % per;
    turn(a, a->q + (t * a->heads + head) * dim, a->q_gamma, a->turns + t * 2 * a->half, 1.0f / sqrtf((float)dim),
         q + r * dim);
    most[r] = NOTHING;
    sum[r] = all(0);
  }
  memset(acc, 0, rows * dim * sizeof *acc);

  const float *group_keys = a->keys + group * a->capacity * dim;
  const float *group_values = a->values + group * a->capacity * dim;
  for (size_t block = from / KEYS * KEYS; block < to; block += KEYS) {
    if (block + KEYS < to) ask(a, group, block + KEYS, from, to);
    else if (group + 1 < a->groups) ask(a, group + 1, from / KEYS * KEYS, from, to);
    const float *keys[KEYS / LANES];
    for (size_t k = 0; k < KEYS / LANES; k++) keys[k] = group_keys + (block + k * LANES) % a->capacity * dim;
    size_t first_tile = from < block ? 0 : (from - block) / LANES;
    size_t end_tile = to - block < KEYS ? (to - block + LANES - 1) / LANES : KEYS / LANES;
    scores(rows, first_tile, end_tile, dim, q, keys, s);
    for (size_t r = 0; r < rows; r++) {
      size_t position = first + r / per, begin = seen_from(a, position), end = position + 1;
      begin = begin < from ? from : begin;
      end = end > to ? to : end;
      begin = begin < block ? 0 : begin - block < KEYS ? begin - block : KEYS;
      end = end < block ? 0 : end - block < KEYS ? end - block : KEYS;
      if (begin < end) soften(s + r * KEYS, begin, end, most + r, sum + r, acc + r * dim, dim);
      else memset(s + r * KEYS, 0, KEYS * sizeof *s);
    }
    // Only rows that some query sees are read as values: what lies in the others must not count, even times 0.
    for (size_t k = 0; k < KEYS; k += LANES) {
      size_t begin = from > block + k ? from : block + k, end = to < block + k + LANES ? to : block + k + LANES;
      if (begin < end)
        mix_all(rows, dim, s + (begin - block), group_values + begin % a->capacity * dim, end - begin, acc);
    }
  }

  for (size_t r = 0; r < rows; r++) {
    size_t t = token + r / per, head = group * per + r % per;
    if (a->chunks == 1) {
      finish(a, t, head, sum_of(sum[r]), acc + r * dim);
    } else {
      float *part = a->parts + ((chunk * a->tokens + t) * a->heads + head) * (dim + 2);
      part[0] = most[r];
      part[1] = sum_of(sum[r]);
      memcpy(part + 2, acc + r * dim, dim * sizeof *acc);
    }
  }
}

static void combine(const struct attention *a, size_t token) {
  size_t dim = a->dim, step = a->tokens * a->heads * (dim + 2);
  for (size_t head = 0; head < a->heads; head++) {
    const float *parts = a->parts + (token * a->heads + head) * (dim + 2);
    float most = NOTHING, sum = 0.0f, acc[MOST_DIM] = {0};
    for (size_t c = 0; c < a->chunks; c++) most = parts[c * step] > most ? parts[c * step] : most;
    for (size_t c = 0; c < a->chunks; c++) {
      const float *part = parts + c * step;
      float weight = exponential(all(part[0] - most))[0];
      sum = __builtin_fmaf(weight, part[1], sum);
      for (size_t i = 0; i < dim; i += LANES)
        store(acc + i, fma_lanes(all(weight), load(part + 2 + i), load(acc + i)));
    }
    finish(a, token, head, sum, acc);
  }
}

const struct attend_routines ROUTINES = {write, attend, combine};
