// AVX2 with FMA and F16C: pairs of products in 16 bits (at most 2 * 15 * 127), then in 32.
#ifdef __x86_64__
#include <immintrin.h>
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)

#define ROUTINES int4_avx2
#define DIRECT_TILES(t) ((t) <= 2 ? 2 : 1)
#define PANEL_ROWS 4
#define PANEL_TILES 1
#include "int4_body.h"

INLINE __m256i dot_eight(__m256i acc, __m256i codes, __m256i x) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1)));
}

union halves {
  lanes_i whole;
  __m256i half[2];
};

INLINE lanes_i dot(lanes_i acc, lanes_u codes, lanes_i x) {
  union halves a = {acc}, c = {(lanes_i)codes}, b = {x};
  a.half[0] = dot_eight(a.half[0], c.half[0], b.half[0]);
  a.half[1] = dot_eight(a.half[1], c.half[1], b.half[1]);
  return a.whole;
}

INLINE lanes_f half_to_float(const uint16_t *p) {
  union { __m256 half[2]; lanes_f whole; } v;
  v.half[0] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
  v.half[1] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)));
  return v.whole;
}

#pragma clang attribute pop
#endif
