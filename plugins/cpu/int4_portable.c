// No instruction set in particular.
#define ROUTINES int4_portable
#define DIRECT_TILES(t) 1
#define PANEL_ROWS 2
#define PANEL_TILES 1
#include "int4_body.h"

// Bytes are taken out of whole lanes by shifts, so that this stays arithmetic on vectors of 32 bits.
INLINE lanes_i dot(lanes_i acc, lanes_u codes, lanes_i x) {
  lanes_i c = (lanes_i)codes;
  acc += (c & 15) * ((lanes_i)((lanes_u)x << 24) >> 24);
  acc += (c >> 8 & 15) * ((lanes_i)((lanes_u)x << 16) >> 24);
  acc += (c >> 16 & 15) * ((lanes_i)((lanes_u)x << 8) >> 24);
  return acc + (c >> 24 & 15) * (x >> 24);
}

INLINE lanes_f half_to_float(const uint16_t *p) {
  lanes_f v;
  for (size_t lane = 0; lane < TILE; lane++) {
    uint32_t h = p[lane], rest = (h & 0x7fffu) << 13;
    float magnitude, power = 0x1p112f; // the two formats' exponents differ by 112
    if (rest >= 0x0f800000u) rest += 0x70000000u; // infinity and NaN stay what they are
    memcpy(&magnitude, &rest, sizeof rest);
    magnitude *= power;
    v[lane] = h & 0x8000u ? -magnitude : magnitude;
  }
  return v;
}
