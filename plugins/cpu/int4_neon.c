// 64-bit Arm with the 8-bit dot product: codes are below 16, so as signed bytes they are themselves.
#ifdef __aarch64__
#include <arm_neon.h>
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)

#define ROUTINES int4_neon
#define DIRECT_TILES(t) ((t) <= 2 ? 2 : 1)
#define PANEL_ROWS 5
#define PANEL_TILES 1
#include "int4_body.h"

union quarters {
  lanes_i whole;
  int32x4_t word[4];
  int8x16_t byte[4];
};

INLINE lanes_i dot(lanes_i acc, lanes_u codes, lanes_i x) {
  union quarters a = {acc}, c = {(lanes_i)codes}, b = {x};
  UNROLL for (int i = 0; i < 4; i++) a.word[i] = vdotq_s32(a.word[i], c.byte[i], b.byte[i]);
  return a.whole;
}

INLINE lanes_f half_to_float(const uint16_t *p) {
  union {
    float32x4_t word[4];
    lanes_f whole;
  } v;
  UNROLL for (int i = 0; i < 4; i++)
    v.word[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)));
  return v.whole;
}

#pragma clang attribute pop
#endif
