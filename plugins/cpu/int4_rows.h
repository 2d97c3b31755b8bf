// The routines of int4.h on activation rows. Plain loops: compilers turn them into vectors of any width.

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

static void quantise(const float *x, size_t first, size_t width, const struct int8_rows *rows, size_t row) {
  size_t block = rows->block;
  for (size_t b = first / block; b < (first + width) / block; b++, x += block) {
    size_t place = b * rows->count + row;
    int8_t *codes = rows->codes + place * block;
    // Magnitudes compare as integers, and there a NaN is the largest: it reaches the scale.
    int32_t most = 0, sum = 0;
    for (size_t k = 0; k < block; k++) {
      int32_t magnitude = bits_of(x[k]) & 0x7fffffff;
      most = magnitude > most ? magnitude : most;
    }
    float largest = float_of(most);
    float inverse = largest < 1e-30f ? 0.0f : 127.0f / largest;
    for (size_t k = 0; k < block; k++) {
      int32_t code = (int8_t)((uint32_t)bits_of(x[k] * inverse + ROUND) - (uint32_t)ROUND_BITS);
      codes[k] = (int8_t)code;
      sum += code;
    }
    rows->scales[place] = largest / 127.0f;
    rows->offsets[place] = -8 * sum;
  }
}

// e^z for z <= 88: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]; relative error below 2e-7.
INLINE float exponential(float z) {
  z = z < -87.0f ? -87.0f : z;
  float shifted = __builtin_fmaf(z, 1.44269504f, ROUND), n = shifted - ROUND;
  // ln 2 in two parts, the first with trailing zeros so that n times it is exact.
  float r = __builtin_fmaf(n, -0.693145752f, z);
  r = __builtin_fmaf(n, -1.42860677e-6f, r);
  float p = 1.0f / 5040;
  p = __builtin_fmaf(p, r, 1.0f / 720);
  p = __builtin_fmaf(p, r, 1.0f / 120);
  p = __builtin_fmaf(p, r, 1.0f / 24);
  p = __builtin_fmaf(p, r, 1.0f / 6);
  p = __builtin_fmaf(p, r, 0.5f);
  p = __builtin_fmaf(p, r, 1.0f);
  p = __builtin_fmaf(p, r, 1.0f);
  uint32_t power = ((uint32_t)bits_of(shifted) - (uint32_t)ROUND_BITS + 127u) << 23;
  return p * float_of((int32_t)power);
}

static void swiglu(const float *gate_up, size_t pairs, float limit, float *h) {
  for (size_t i = 0; i < pairs; i++, gate_up += 2 * TILE, h += TILE)
    for (size_t lane = 0; lane < TILE; lane++) {
      float gate = gate_up[lane], up = gate_up[TILE + lane];
      float z = -gate > 88.0f ? 88.0f : -gate;
      float silu = gate / (1.0f + exponential(z));
      silu = silu > limit ? limit : silu;
      up = up > limit ? limit : up;
      up = up < -limit ? -limit : up;
      h[lane] = silu * up;
    }
}

static void mix(const float *d, size_t width, float weight, int more, float *y) {
  if (more)
    for (size_t i = 0; i < width; i++) y[i] = __builtin_fmaf(weight, d[i], y[i]);
  else
    for (size_t i = 0; i < width; i++) y[i] = weight * d[i];
}
