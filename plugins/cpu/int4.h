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
};

// By `enum isa`; null where the target has no such instructions.
extern const struct int4_routines *const int4_routines[];

static inline size_t tile_bytes(size_t columns) { return columns * TILE / 2; }

static inline size_t tile_scales(const struct int4_matrix *m) { return m->columns / m->block * TILE; }

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
