// The routines of int4.h on fp32 rows: the few weights that stay as they are, and what lies between products.

enum { DENSE_TILE = 4, DENSE_AHEAD = 256 }; // DENSE_AHEAD: values of each row asked for early

// `rows` rows of w side by side, by `count` rows of x; columns beyond the last whole vector one by one.
INLINE void dense_tile(size_t rows, size_t count, const float *w, size_t columns, const float *x, float *y,
                       size_t stride) {
  lanes_f sum[DENSE_TILE][DENSE_TILE] = {0};
  size_t k = 0;
  for (; k + LANES <= columns; k += LANES) {
    // Past the end of the rows the next ones follow.
    size_t early = k + DENSE_AHEAD < columns ? k + DENSE_AHEAD : k + DENSE_AHEAD + (rows - 1) * columns;
    lanes_f v[DENSE_TILE];
    UNROLL for (size_t t = 0; t < count; t++) v[t] = load(x + t * columns + k);
    UNROLL for (size_t r = 0; r < rows; r++) {
      lanes_f weight = load(w + r * columns + k);
      __builtin_prefetch(w + r * columns + early);
      UNROLL for (size_t t = 0; t < count; t++) sum[t][r] = fma_lanes(v[t], weight, sum[t][r]);
    }
  }
  UNROLL for (size_t t = 0; t < count; t++)
    UNROLL for (size_t r = 0; r < rows; r++) {
      float total = sum_of(sum[t][r]);
      for (size_t rest = k; rest < columns; rest++)
        total = __builtin_fmaf(x[t * columns + rest], w[r * columns + rest], total);
      y[t * stride + r] = total;
    }
}

static void dense(const float *w, size_t rows, size_t columns, const float *x, size_t count, float *y,
                  size_t stride) {
  size_t n = 0;
  for (; n + DENSE_TILE <= rows; n += DENSE_TILE) {
    const float *some = w + n * columns;
    size_t t = 0;
    for (; t + DENSE_TILE <= count; t += DENSE_TILE)
      dense_tile(DENSE_TILE, DENSE_TILE, some, columns, x + t * columns, y + t * stride + n, stride);
    for (; t < count; t++) dense_tile(DENSE_TILE, 1, some, columns, x + t * columns, y + t * stride + n, stride);
  }
  for (; n < rows; n++)
    for (size_t t = 0; t < count; t++)
      dense_tile(1, 1, w + n * columns, columns, x + t * columns, y + t * stride + n, stride);
}

static void norm(const float *x, const float *gamma, size_t width, float eps, float *y) {
  lanes_f sum[4] = {0};
  for (size_t k = 0; k < width; k += LANES) {
    lanes_f v = load(x + k);
    sum[k / LANES % 4] = fma_lanes(v, v, sum[k / LANES % 4]);
  }
  float scale = 1.0f / __builtin_sqrtf(sum_of((sum[0] + sum[1]) + (sum[2] + sum[3])) / (float)width + eps);
  for (size_t k = 0; k < width; k += LANES) store(y + k, load(x + k) * scale * load(gamma + k));
}

static void add(const float *a, const float *b, size_t width, float *y) {
  for (size_t k = 0; k < width; k += LANES) store(y + k, load(a + k) + load(b + k));
}

static void sigmoid_of(const float *x, size_t width, float *y) {
  for (size_t k = 0; k < width; k += LANES) store(y + k, sigmoid(load(x + k)));
}
