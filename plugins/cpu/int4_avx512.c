// AVX-512 with VNNI: one instruction for the dot products of 16 rows.
#ifdef __x86_64__
#include <immintrin.h>
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c"))), apply_to = function)

#define ROUTINES int4_avx512
#define DIRECT_TILES(t) 4
#define PANEL_ROWS 6
#define PANEL_TILES 4
#include "int4_body.h"

INLINE lanes_i dot(lanes_i acc, lanes_u codes, lanes_i x) {
  return (lanes_i)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)codes, (__m512i)x);
}

INLINE lanes_f half_to_float(const uint16_t *p) {
  return (lanes_f)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

#pragma clang attribute pop
#endif
