// Arithmetic on vectors of 16 lanes, the same bits on every instruction set: one register of AVX-512, several of
// the others (compilers split them). Multiply-adds are fused where they are written so, and nowhere else.
#ifndef STEP35_LANES_H
#define STEP35_LANES_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 16 };

typedef int32_t lanes_i __attribute__((vector_size(64)));
typedef uint32_t lanes_u __attribute__((vector_size(64)));
typedef float lanes_f __attribute__((vector_size(64)));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("clang loop unroll(full)")
#define TWICE _Pragma("clang loop unroll_count(2)")

// Adding this brings the nearest integer (ties to even) of a small number into the low bits of the sum.
static const float ROUND = 12582912.0f;
static const int32_t ROUND_BITS = 0x4b400000;

INLINE int32_t bits_of(float v) {
  int32_t i;
  memcpy(&i, &v, sizeof i);
  return i;
}

INLINE float float_of(int32_t i) {
  float v;
  memcpy(&v, &i, sizeof v);
  return v;
}

INLINE lanes_f load(const float *p) {
  lanes_f v;
  memcpy(&v, p, sizeof v);
  return v;
}

INLINE void store(float *p, lanes_f v) { memcpy(p, &v, sizeof v); }

INLINE lanes_f all(float x) { return x - (lanes_f){0}; }

INLINE lanes_f fma_lanes(lanes_f a, lanes_f b, lanes_f c) { return __builtin_elementwise_fma(a, b, c); }

// The sum of the lanes, by halves: always in the same order.
INLINE float sum_of(lanes_f v) {
  float part[LANES];
  memcpy(part, &v, sizeof v);
  for (size_t half = LANES / 2; half; half /= 2)
    for (size_t i = 0; i < half; i++) part[i] += part[i + half];
  return part[0];
}

// a where the mask is set, b elsewhere.
INLINE lanes_f pick(lanes_i mask, lanes_f a, lanes_f b) { return (lanes_f)((mask & (lanes_i)a) | (~mask & (lanes_i)b)); }

// e^z for z <= 88: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]; relative error below 2e-7. NaN stays NaN.
INLINE lanes_f exponential(lanes_f z) {
  z = pick(z < -87.0f, all(-87.0f), z);
  lanes_f shifted = fma_lanes(z, all(1.44269504f), all(ROUND)), n = shifted - ROUND;
  // ln 2 in two parts, the first with trailing zeros so that n times it is exact.
  lanes_f r = fma_lanes(n, all(-0.693145752f), z);
  r = fma_lanes(n, all(-1.42860677e-6f), r);
  lanes_f p = all(1.0f / 5040);
  p = fma_lanes(p, r, all(1.0f / 720));
  p = fma_lanes(p, r, all(1.0f / 120));
  p = fma_lanes(p, r, all(1.0f / 24));
  p = fma_lanes(p, r, all(1.0f / 6));
  p = fma_lanes(p, r, all(0.5f));
  p = fma_lanes(p, r, all(1.0f));
  p = fma_lanes(p, r, all(1.0f));
  lanes_u power = ((lanes_u)shifted - (uint32_t)ROUND_BITS + 127u) << 23;
  return p * (lanes_f)power;
}

INLINE lanes_f sigmoid(lanes_f x) { return 1.0f / (1.0f + exponential(pick(-x > 88.0f, all(88.0f), -x))); }

#endif
