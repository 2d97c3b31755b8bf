// The routines of convert.h over 16 lanes, written once and compiled for each instruction set.
//
// The file that includes this one defines ROUTINES and ROUTINES_NAME. Every step is exact or rounds once, to
// nearest even, so all instruction sets and numpy give the same bits.
#include <float.h>
#include <string.h>

#include "convert.h"

enum { LANES = 16, MOST_GROUP = 4096 };

typedef float lanes_f __attribute__((vector_size(64)));
typedef uint32_t lanes_u __attribute__((vector_size(64)));
typedef int32_t lanes_i __attribute__((vector_size(64)));
typedef uint16_t lanes_h __attribute__((vector_size(32)));
typedef uint8_t lanes_b __attribute__((vector_size(16)));

#define INLINE static inline __attribute__((always_inline))

static const uint32_t INFINITE = 0x7f800000;

INLINE lanes_u load_bits(const void *p, size_t i, int bf16) {
  if (bf16) {
    lanes_h h;
    memcpy(&h, (const uint16_t *)p + i, sizeof h);
    return __builtin_convertvector(h, lanes_u) << 16;
  }
  lanes_u u;
  memcpy(&u, (const float *)p + i, sizeof u);
  return u;
}

INLINE lanes_u most(lanes_u a, lanes_u b) { return __builtin_elementwise_max(a, b); }

INLINE uint32_t most_of(lanes_u v) { return __builtin_reduce_max(v); }

INLINE const void *at(const struct convert_source *w, size_t i, int bf16) {
  return (const char *)w->values + i * (bf16 ? 2 : 4);
}

INLINE uint32_t one(const void *p, size_t i, int bf16) {
  uint32_t u = 0;
  if (bf16) {
    uint16_t h;
    memcpy(&h, (const uint16_t *)p + i, sizeof h);
    return (uint32_t)h << 16;
  }
  memcpy(&u, (const uint32_t *)p + i, sizeof u);
  return u;
}

INLINE float as_float(uint32_t u) {
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}

INLINE uint32_t as_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, sizeof u);
  return u;
}

INLINE uint16_t half_bits(_Float16 h) {
  uint16_t u;
  memcpy(&u, &h, sizeof u);
  return u;
}

// The value of largest magnitude, as an unsigned order: magnitude first, and of two equal ones the positive.
INLINE uint32_t extreme_of(const void *p, size_t n, int bf16) {
  lanes_u found = {0};
  for (size_t i = 0; i < n; i += LANES) {
    lanes_u u = load_bits(p, i, bf16);
    found = most(found, (u << 1 | u >> 31) ^ 1);
  }
  uint32_t key = most_of(found);
  return key >> 1 | (~key & 1) << 31;
}

// Integers nearest to values / scale, within [-half, half - 1]; the sum with 1.5 * 2^23 rounds to nearest even.
INLINE lanes_i codes_of(const void *p, size_t i, int bf16, float scale, int half) {
  lanes_f x = (lanes_f)load_bits(p, i, bf16) / scale + 12582912.0f;
  lanes_i c = (lanes_i)x - 0x4b400000;
  c = __builtin_elementwise_max(c, (lanes_i){0} - half);
  return __builtin_elementwise_min(c, (lanes_i){0} + (half - 1));
}

INLINE int group_scale(const void *p, size_t group, int bf16, float ratio, int half, float *scale,
                       uint16_t *stored) {
  uint32_t extreme = extreme_of(p, group, bf16);
  if ((extreme & 0x7fffffff) >= INFINITE) return CONVERT_NOT_FINITE;
  _Float16 h = (_Float16)(as_float(extreme) * ratio / -(float)half);
  if ((half_bits(h) & 0x7fff) >= 0x7c00) return CONVERT_SCALE_OVERFLOW;
  if ((half_bits(h) & 0x7fff) == 0) h = 1;
  *scale = (float)h;
  *stored = half_bits(h);
  return CONVERT_OK;
}

INLINE void store_bytes(uint8_t *to, lanes_i c) {
  lanes_b b = __builtin_convertvector(c, lanes_b);
  memcpy(to, &b, sizeof b);
}

INLINE int one_row(const void *p, size_t columns, int bf16, int half, size_t group, const float *ratios,
                   int offset, uint8_t *codes, uint16_t *scales) {
  for (size_t g = 0; g * group < columns; g++) {
    const void *from = (const char *)p + g * group * (bf16 ? 2 : 4);
    float scale;
    int state = group_scale(from, group, bf16, ratios ? ratios[g] : 1, half, &scale, &scales[g]);
    if (state) return state;
    for (size_t i = 0; i < group; i += LANES)
      store_bytes(codes + g * group + i, codes_of(from, i, bf16, scale, half) + offset);
  }
  return CONVERT_OK;
}

// Two rows side by side, so that their codes meet in registers.
INLINE int two_rows(const void *p, const void *q, size_t columns, int bf16, size_t group, const float *ratios,
                    const float *ratios_q, int offset, uint8_t *codes, uint16_t *scales, uint16_t *scales_q) {
  for (size_t g = 0; g * group < columns; g++) {
    const char *a = (const char *)p + g * group * (bf16 ? 2 : 4);
    const char *b = (const char *)q + g * group * (bf16 ? 2 : 4);
    float sa, sb;
    int state = group_scale(a, group, bf16, ratios ? ratios[g] : 1, 8, &sa, &scales[g]);
    if (!state) state = group_scale(b, group, bf16, ratios_q ? ratios_q[g] : 1, 8, &sb, &scales_q[g]);
    if (state) return state;
    for (size_t i = 0; i < group; i += LANES) {
      lanes_i low = codes_of(a, i, bf16, sa, 8) + offset, high = codes_of(b, i, bf16, sb, 8) + offset;
      store_bytes(codes + g * group + i, (low & 15) | high << 4);
    }
  }
  return CONVERT_OK;
}

INLINE int integers_of(const struct convert_source *w, int bf16, int bits, size_t group, const float *ratios,
                       int layout, int offset, uint8_t *codes, uint16_t *scales) {
  size_t k = w->columns, groups = k / group, rows = w->rows;
  if (layout == COLUMN_PAIRS) {
    size_t r = 0;
    for (; r + 1 < rows; r += 2) {
      const float *f = ratios ? ratios + r * groups : NULL;
      int state = two_rows(at(w, r * k, bf16), at(w, (r + 1) * k, bf16), k, bf16, group, f,
                           f ? f + groups : NULL, offset, codes + r / 2 * k, scales + r * groups,
                           scales + (r + 1) * groups);
      if (state) return state;
    }
    if (r == rows) return CONVERT_OK;
    uint8_t *last = codes + r / 2 * k;
    int state = one_row(at(w, r * k, bf16), k, bf16, 8, group, ratios ? ratios + r * groups : NULL, offset,
                        last, scales + r * groups);
    for (size_t i = 0; i < k; i++) last[i] &= 15;
    return state;
  }
  for (size_t r = 0; r < rows; r++) {
    const float *f = ratios ? ratios + r * groups : NULL;
    if (layout == BYTES) {
      int state = one_row(at(w, r * k, bf16), k, bf16, 1 << (bits - 1), group, f, offset, codes + r * k,
                          scales + r * groups);
      if (state) return state;
      continue;
    }
    // A group at a time through a small buffer.
    for (size_t g = 0; g < groups; g++) {
      uint8_t row[MOST_GROUP], *to = codes + (r * k + g * group) / 2;
      int state = one_row(at(w, r * k + g * group, bf16), group, bf16, 8, group, f ? f + g : NULL, offset, row,
                          scales + r * groups + g);
      if (state) return state;
      for (size_t i = 0; i < group / 2; i++) to[i] = (row[2 * i] & 15) | row[2 * i + 1] << 4;
    }
  }
  return CONVERT_OK;
}

static int integers(const struct convert_source *w, int bits, size_t group, const float *ratios, int layout,
                    int offset, uint8_t *codes, uint16_t *scales) {
  return w->bf16 ? integers_of(w, 1, bits, group, ratios, layout, offset, codes, scales)
                 : integers_of(w, 0, bits, group, ratios, layout, offset, codes, scales);
}

// e4m3 (no infinities, bias 7) of x, |x| < 464. From 2^-6 on, three bits of mantissa are kept; below, steps are
// 2^-9, and the sum with 2^14, whose own step that is, rounds to them.
INLINE lanes_i e4m3(lanes_f x) {
  lanes_u u = (lanes_u)x, sign = u >> 24 & 0x80, magnitude = u & 0x7fffffff;
  lanes_u normal = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3);
  lanes_u small = (lanes_u)((lanes_f)magnitude + 16384.0f) - 0x46800000;
  lanes_u use = (lanes_u)(magnitude < 0x3c800000); // all ones below 2^-6
  return (lanes_i)(sign | (use & small) | (~use & normal));
}

INLINE uint32_t magnitude_of(const void *p, size_t n, int bf16) {
  lanes_u found = {0};
  size_t i = 0;
  for (; i + LANES <= n; i += LANES) found = most(found, load_bits(p, i, bf16) & 0x7fffffff);
  uint32_t m = most_of(found);
  for (; i < n; i++) {
    uint32_t u = one(p, i, bf16) & 0x7fffffff;
    m = u > m ? u : m;
  }
  return m;
}

INLINE int fp8_of(const struct convert_source *w, int bf16, size_t block_rows, size_t block_columns,
                  uint8_t *codes, float *scales) {
  size_t k = w->columns, across = (k + block_columns - 1) / block_columns;
  for (size_t top = 0; top < w->rows; top += block_rows, scales += across) {
    size_t bottom = top + block_rows < w->rows ? top + block_rows : w->rows;
    for (size_t b = 0; b < across; b++) scales[b] = 0;
    for (size_t r = top; r < bottom; r++)
      for (size_t b = 0; b < across; b++) {
        size_t left = b * block_columns, n = k - left < block_columns ? k - left : block_columns;
        uint32_t m = magnitude_of(at(w, r * k + left, bf16), n, bf16);
        if (m >= INFINITE) return CONVERT_NOT_FINITE;
        if (as_float(m) > scales[b]) scales[b] = as_float(m);
      }
    for (size_t b = 0; b < across; b++) {
      scales[b] /= 448.0f;
      if (scales[b] < FLT_MIN) scales[b] = 1; // nothing there that the format could hold
    }
    for (size_t r = top; r < bottom; r++)
      for (size_t b = 0; b < across; b++) {
        size_t left = b * block_columns, n = k - left < block_columns ? k - left : block_columns, i = 0;
        const void *from = at(w, r * k + left, bf16);
        uint8_t *to = codes + r * k + left;
        for (; i + LANES <= n; i += LANES) store_bytes(to + i, e4m3((lanes_f)load_bits(from, i, bf16) / scales[b]));
        if (i == n) continue;
        lanes_u rest = {0};
        uint8_t out[LANES];
        for (size_t j = i; j < n; j++) rest[j - i] = one(from, j, bf16);
        store_bytes(out, e4m3((lanes_f)rest / scales[b]));
        memcpy(to + i, out, n - i);
      }
  }
  return CONVERT_OK;
}

static int fp8(const struct convert_source *w, size_t block_rows, size_t block_columns, uint8_t *codes,
               float *scales) {
  return w->bf16 ? fp8_of(w, 1, block_rows, block_columns, codes, scales)
                 : fp8_of(w, 0, block_rows, block_columns, codes, scales);
}

static int finite(const struct convert_source *w) {
  size_t n = w->rows * w->columns;
  uint32_t m = w->bf16 ? magnitude_of(w->values, n, 1) : magnitude_of(w->values, n, 0);
  return m >= INFINITE ? CONVERT_NOT_FINITE : CONVERT_OK;
}

const struct convert_routines ROUTINES = {ROUTINES_NAME, integers, fp8, finite};
