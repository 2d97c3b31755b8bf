// Products of int8 activations with 4-bit weights: the forms they are kept in and the routines on them.
//
// A matrix of N rows and K columns is cut into tiles of 16 rows. A tile is stored as K/8 groups of 64 bytes:
// byte 4*r + j of group c holds in its low nibble the code of row r, column 8*c + j, and in its high nibble
// that of column 8*c + 4 + j. So one vector load feeds two dot-product instructions for 16 rows, and a tile
// is one contiguous stream. The scales, fp16, are [tile][K/block][16]: a weight is (code - 8) * scale.
//
// Every routine gives the same bits on every instruction set and however rows are grouped: dot products
// within a block are exact integers, and blocks are added in ascending order with one fused multiply-add.
#ifndef STEP35_INT4_H
#define STEP35_INT4_H

#include <stddef.h>
#include <stdint.h>

enum { TILE = 16, MOST_BLOCK = 128 };

struct int4_matrix {
  const uint8_t *codes;
  const uint16_t *scales;
  size_t columns; // K
  size_t block;
  // Where reading goes on after a product with some of the tiles; null: at the tile that follows. Asked for
  // early, since what a jump leads to is in no cache and often on pages whose translation is not either.
  const uint8_t *next_codes;
  const uint16_t *next_scales;
};

// `count` activation rows by block: codes [K/block][count][block], scales and offsets [K/block][count].
struct int8_rows {
  int8_t *codes;
  float *scales;
  int32_t *offsets; // -8 * the sum of the block's codes: what the codes' zero point adds
  size_t count;
  size_t block;
};

struct int4_routines {
  // Quantises `width` values of `row` from column `first` on; both are multiples of the block.
  // A block that holds a NaN or an infinity makes the results that use it non-finite.
  void (*quantise)(const float *x, size_t first, size_t width, const struct int8_rows *rows, size_t row);

  // y[i * stride + 16 * (tile - begin) + lane] for the rows first + i, i < count, and the tiles
  // begin .. end - 1.
  void (*multiply)(const struct int4_matrix *w, size_t begin, size_t end, const struct int8_rows *x, size_t first,
                   size_t count, float *y, size_t stride);

  // min(silu(gate), limit) * clamp(up, -limit, limit) of `vectors` times 16 gates and ups, each `step` values
  // after the one before.
  void (*swiglu)(const float *gate, const float *up, size_t step, size_t vectors, float limit, float *h);

  // y = weight * d, or y += weight * d where `more`.
  void (*mix)(const float *d, size_t width, float weight, int more, float *y);

  // y[t * stride + n] = the product of row t of x and row n of w, each of `columns` values, n < rows and t < count.
  void (*dense)(const float *w, size_t rows, size_t columns, const float *x, size_t count, float *y, size_t stride);

  // y = x / sqrt(mean of x^2 + eps) * gamma; the width is a multiple of 16.
  void (*norm)(const float *x, const float *gamma, size_t width, float eps, float *y);

  // Widths that are multiples of 16.
  void (*add)(const float *a, const float *b, size_t width, float *y);
  void (*sigmoid)(const float *x, size_t width, float *y);
};

// By `enum isa`; null where the target has no such instructions.
extern const struct int4_routines *const int4_routines[];

static inline size_t tile_bytes(size_t columns) { return columns * TILE / 2; }

static inline size_t tile_scales(const struct int4_matrix *m) { return m->columns / m->block * TILE; }

// Memory for `count` quantised rows, a multiple of 64 bytes, and where in it things lie.
static inline size_t rows_size(size_t count, size_t columns, size_t block) {
  return (count * columns + 2 * count * (columns / block) * sizeof(float) + 63) / 64 * 64;
}

static inline void rows_in(void *room, size_t count, size_t columns, size_t block, struct int8_rows *out) {
  float *scales = room;
  int32_t *offsets = (int32_t *)(scales + count * (columns / block));
  *out = (struct int8_rows){(int8_t *)(offsets + count * (columns / block)), scales, offsets, count, block};
}

// Asks for up to a kilobyte from byte `done` of `bytes`; says how much, 0 at the end.
static inline size_t ask_bytes(const void *start, size_t bytes, size_t done) {
  size_t left = done < bytes ? bytes - done : 0, some = left < 1024 ? left : 1024;
  for (size_t at = done; at < done + some; at += 64) __builtin_prefetch((const char *)start + at, 0, 2);
  return some;
}

// The same of the codes of tiles begin .. end - 1, which their scales follow.
static inline size_t ask_tiles(const struct int4_matrix *m, size_t begin, size_t end, size_t done) {
  size_t codes = (end - begin) * tile_bytes(m->columns), scales = tile_scales(m);
  if (done < codes) return ask_bytes(m->codes + begin * tile_bytes(m->columns), codes, done);
  return ask_bytes(m->scales + begin * scales, (end - begin) * scales * sizeof(uint16_t), done - codes);
}

// The matrix `index` of a stack whose matrices have `tiles` tiles each; after it comes tile `tile` of `next`.
static inline struct int4_matrix matrix_at(const struct int4_matrix *stack, size_t tiles, size_t index,
                                           size_t next, size_t tile) {
  struct int4_matrix m = *stack;
  size_t codes = tile_bytes(m.columns), scales = tile_scales(stack);
  m.next_codes = m.codes + (next * tiles + tile) * codes;
  m.next_scales = m.scales + (next * tiles + tile) * scales;
  m.codes += index * tiles * codes;
  m.scales += index * tiles * scales;
  return m;
}

#endif
