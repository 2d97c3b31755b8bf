// The routines of int4.h on activation rows. Plain loops: compilers turn them into vectors of any width.

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

static void swiglu(const float *gate, const float *up, size_t step, size_t vectors, float limit, float *h) {
  for (size_t i = 0; i < vectors; i++, gate += step, up += step, h += TILE) {
    lanes_f g = load(gate), u = load(up), silu = g * sigmoid(g);
    silu = pick(silu > limit, all(limit), silu);
    u = pick(u > limit, all(limit), u);
    u = pick(u < -limit, all(-limit), u);
    store(h, silu * u);
  }
}

static void mix(const float *d, size_t width, float weight, int more, float *y) {
  if (more)
    for (size_t i = 0; i < width; i++) y[i] = __builtin_fmaf(weight, d[i], y[i]);
  else
    for (size_t i = 0; i < width; i++) y[i] = weight * d[i];
}
