// The routines of int4.h over 16 lanes, written once and compiled for each instruction set.
//
// The file that includes this one defines
//   dot(acc, codes, x)      acc + the dot products of each lane's four codes with the four bytes of lane x
//   half_to_float(p)        sixteen fp16 values
//   DIRECT_TILES(t)         tiles read side by side for t rows at once
//   PANEL_ROWS, PANEL_TILES the register tile for many rows
//   ROUTINES                the name of the table
#include "int4.h"
#include "lanes.h"

enum {
  DIRECT_ROWS = 4,    // up to here codes are expanded as they are read; beyond, that costs more than it saves
  PANEL_COUNT = 64,   // rows that share one expansion; their sums stay in the first-level cache
  AHEAD = 1024,       // bytes of each stream asked for early: pages of 4 KiB defeat the hardware's own guess
  SCALES_AHEAD = 4,   // blocks
};

// Each instruction set brings its own forms of these two.
INLINE lanes_i dot(lanes_i acc, lanes_u codes, lanes_i x);
INLINE lanes_f half_to_float(const uint16_t *p);

INLINE lanes_u load_codes(const uint8_t *p) {
  lanes_u v;
  memcpy(&v, p, sizeof v);
  return v;
}

INLINE lanes_i four_bytes(const int8_t *p) {
  int32_t v;
  memcpy(&v, p, sizeof v);
  return v - (lanes_i){0};
}

INLINE lanes_f add_block(lanes_i acc, lanes_f scale, float x_scale, lanes_f sum) {
  return __builtin_elementwise_fma(__builtin_convertvector(acc, lanes_f), scale * x_scale, sum);
}

// A group of tiles being read side by side, and what is read after it.
struct reading {
  const uint8_t *codes;
  const uint16_t *scales;
  size_t block, blocks, bytes; // bytes: of a tile's codes
  uintptr_t then_codes;        // how much further than codes and scales the next group's are
  const uint16_t *then_scales;
};

INLINE struct reading read_group(const struct int4_matrix *w, size_t tile, size_t tiles, size_t end) {
  size_t blocks = w->columns / w->block, bytes = tile_bytes(w->columns);
  struct reading g = {w->codes + tile * bytes, w->scales + tile * blocks * TILE, w->block, blocks, bytes, 0, NULL};
  int jump = tile + tiles >= end && w->next_codes;
  g.then_codes = (jump ? (uintptr_t)w->next_codes - (uintptr_t)g.codes : tiles * bytes) - bytes;
  g.then_scales = jump ? w->next_scales : g.scales + tiles * blocks * TILE;
  return g;
}

INLINE void ask_for_scales(const struct reading *g, size_t b, size_t tiles) {
  size_t early = b + SCALES_AHEAD;
  const uint16_t *p = early < g->blocks ? g->scales + early * TILE : g->then_scales + (early - g->blocks) * TILE;
  UNROLL for (size_t r = 0; r < tiles; r++) __builtin_prefetch(p + r * g->blocks * TILE);
}

// How far ahead of block b to ask for codes: past a tile's end goes on in the stream's next tile.
INLINE uintptr_t ahead(const struct reading *g, size_t b) {
  return b + AHEAD / (g->block * TILE / 2) < g->blocks ? AHEAD : AHEAD + g->then_codes;
}

INLINE void ask(const uint8_t *p, uintptr_t further) { __builtin_prefetch((const void *)((uintptr_t)p + further)); }

// Few rows: `tiles` streams, codes expanded in registers, all rows from one reading.
INLINE void direct(size_t rows, size_t tiles, struct reading g, struct int8_rows x, size_t first,
                   float *y, size_t stride) {
  size_t block = g.block, bytes = g.bytes;
  lanes_f sum[DIRECT_ROWS][4] = {0};
  for (size_t b = 0; b < g.blocks; b++) {
    lanes_i acc[DIRECT_ROWS][4];
    size_t place = b * x.count + first;
    const int8_t *xs = x.codes + place * block;
    UNROLL for (size_t t = 0; t < rows; t++) {
      lanes_i offset = x.offsets[place + t] - (lanes_i){0};
      UNROLL for (size_t r = 0; r < tiles; r++) acc[t][r] = offset;
    }
    uintptr_t early = ahead(&g, b);
    ask_for_scales(&g, b, tiles);
    const uint8_t *group = g.codes + b * block * (TILE / 2);
    TWICE for (size_t k = 0; k < block; k += 8, group += 64) {
      lanes_u raw[4];
      UNROLL for (size_t r = 0; r < tiles; r++) {
        raw[r] = load_codes(group + r * bytes);
        ask(group + r * bytes, early);
      }
      UNROLL for (size_t t = 0; t < rows; t++) {
        lanes_i low = four_bytes(xs + t * block + k), high = four_bytes(xs + t * block + k + 4);
        UNROLL for (size_t r = 0; r < tiles; r++) {
          acc[t][r] = dot(acc[t][r], raw[r] & 0x0f0f0f0fu, low);
          acc[t][r] = dot(acc[t][r], raw[r] >> 4 & 0x0f0f0f0fu, high);
        }
      }
    }
    UNROLL for (size_t r = 0; r < tiles; r++) {
      lanes_f scale = half_to_float(g.scales + (r * g.blocks + b) * TILE);
      UNROLL for (size_t t = 0; t < rows; t++)
        sum[t][r] = add_block(acc[t][r], scale, x.scales[place + t], sum[t][r]);
    }
  }
  UNROLL for (size_t t = 0; t < rows; t++)
    UNROLL for (size_t r = 0; r < tiles; r++) memcpy(y + t * stride + r * TILE, &sum[t][r], sizeof sum[t][r]);
}

// A register tile of one block: `rows` rows by PANEL_TILES tiles whose codes are already single bytes.
// Meanwhile it asks for memory: of each of the tiles' streams, `apart` bytes apart, a block's half from `soon`.
// Asking here and not while codes are expanded spreads the requests over the arithmetic.
INLINE void panel_rows(size_t rows, size_t block, const uint8_t *wide, const lanes_f *scale,
                       struct int8_rows x, size_t place, lanes_f (*sum)[PANEL_TILES],
                       const uint8_t *soon, size_t apart) {
  enum { tiles = PANEL_TILES };
  lanes_i acc[PANEL_ROWS][PANEL_TILES];
  const int8_t *xs = x.codes + place * block;
  UNROLL for (size_t t = 0; t < rows; t++) {
    lanes_i offset = x.offsets[place + t] - (lanes_i){0};
    UNROLL for (size_t r = 0; r < tiles; r++) acc[t][r] = offset;
  }
  for (size_t k = 0; k < block; k += 16, soon += 64)
    UNROLL for (size_t j = 0; j < 4; j++, wide += 64 * tiles) {
      lanes_u codes[tiles];
      if (j < tiles) __builtin_prefetch(soon + j * apart);
      UNROLL for (size_t r = 0; r < tiles; r++) codes[r] = load_codes(wide + r * 64);
      UNROLL for (size_t t = 0; t < rows; t++) {
        lanes_i four = four_bytes(xs + t * block + k + 4 * j);
        UNROLL for (size_t r = 0; r < tiles; r++) acc[t][r] = dot(acc[t][r], codes[r], four);
      }
    }
  UNROLL for (size_t t = 0; t < rows; t++)
    UNROLL for (size_t r = 0; r < tiles; r++)
      sum[t][r] = add_block(acc[t][r], scale[r], x.scales[place + t], sum[t][r]);
}

// Many rows: a block's codes are expanded once and used by up to PANEL_COUNT rows.
// `block` is given apart so that it can be a constant.
INLINE void panel(size_t block, struct reading g, struct int8_rows x, size_t first, size_t count, float *y,
                  size_t stride) {
  enum { TILES = PANEL_TILES };
  size_t bytes = g.bytes;
  _Alignas(64) uint8_t wide[MOST_BLOCK * TILE * TILES];
  lanes_f sum[PANEL_COUNT][TILES], scale[TILES];
  memset(sum, 0, count * sizeof sum[0]);
  for (size_t b = 0; b < g.blocks; b++) {
    uintptr_t early = ahead(&g, b);
    ask_for_scales(&g, b, TILES);
    const uint8_t *group_start = g.codes + b * block * (TILE / 2), *group = group_start;
    uint8_t *to = wide;
    for (size_t k = 0; k < block / 8; k++, group += 64, to += 128 * TILES)
      UNROLL for (size_t r = 0; r < TILES; r++) {
        lanes_u raw = load_codes(group + r * bytes);
        lanes_u low = raw & 0x0f0f0f0fu, high = raw >> 4 & 0x0f0f0f0fu;
        memcpy(to + r * 64, &low, 64);
        memcpy(to + (TILES + r) * 64, &high, 64);
      }
    UNROLL for (size_t r = 0; r < TILES; r++) scale[r] = half_to_float(g.scales + (r * g.blocks + b) * TILE);
    // The first two groups of rows ask for half of what is read next each, the others for what is at hand.
    const uint8_t *soon = (const uint8_t *)((uintptr_t)group_start + early);
    size_t apart = bytes, half = block * TILE / 4;
    if (count <= PANEL_ROWS)
      for (size_t k = 0; k < half; k += 64)
        UNROLL for (size_t r = 0; r < TILES; r++) ask(soon, half + k + r * bytes);
    size_t t = 0, place = b * x.count + first;
    for (; t + PANEL_ROWS <= count; t += PANEL_ROWS) {
      panel_rows(PANEL_ROWS, block, wide, scale, x, place + t, sum + t, soon, apart);
      soon = t ? wide : soon + half;
      apart = t ? 0 : bytes;
    }
    switch (count - t) {
#define REST(n)                                                                                        \
  case n:                                                                                              \
    panel_rows(n < PANEL_ROWS ? n : 1, block, wide, scale, x, place + t, sum + t, soon, apart);        \
    break;
      REST(1) REST(2) REST(3) REST(4) REST(5)
#undef REST
      default: break;
    }
  }
  for (size_t t = 0; t < count; t++) memcpy(y + t * stride, sum[t], sizeof sum[t]);
}

static void panel_128(struct reading g, const struct int8_rows *x, size_t first, size_t count, float *y,
                      size_t stride) {
  panel(128, g, *x, first, count, y, stride);
}

static void panel_other(struct reading g, const struct int8_rows *x, size_t first, size_t count, float *y,
                        size_t stride) {
  panel(g.block, g, *x, first, count, y, stride);
}

// Up to PANEL_COUNT rows.
static void multiply_some(const struct int4_matrix *w, size_t begin, size_t end, const struct int8_rows *x,
                          size_t first, size_t count, float *y, size_t stride) {
  size_t tile = begin;
  switch (count) {
#define DIRECT(n)                                                                          \
  case n:                                                                                  \
    for (; tile + DIRECT_TILES(n) <= end; tile += DIRECT_TILES(n))                         \
      direct(n, DIRECT_TILES(n), read_group(w, tile, DIRECT_TILES(n), end), *x, first,     \
             y + (tile - begin) * TILE, stride);                                           \
    break;
    DIRECT(1) DIRECT(2) DIRECT(3) DIRECT(4)
#undef DIRECT
    default:
      for (; tile + PANEL_TILES <= end; tile += PANEL_TILES)
        (w->block == 128 ? panel_128 : panel_other)(read_group(w, tile, PANEL_TILES, end), x, first, count,
                                                    y + (tile - begin) * TILE, stride);
  }
  // The few tiles left of an odd width.
  for (; tile < end; tile++)
    for (size_t t = 0; t < count; t++)
      direct(1, 1, read_group(w, tile, 1, end), *x, first + t, y + t * stride + (tile - begin) * TILE, stride);
}

static void multiply(const struct int4_matrix *w, size_t begin, size_t end, const struct int8_rows *x,
                     size_t first, size_t count, float *y, size_t stride) {
  // Tiles outside, rows inside: a group of tiles stays in the second-level cache for all rows.
  size_t step = count <= PANEL_COUNT ? end - begin : PANEL_TILES;
  for (size_t tile = begin; tile < end; tile += step)
    for (size_t done = 0; done < count; done += PANEL_COUNT)
      multiply_some(w, tile, end - tile < step ? end : tile + step, x, first + done,
                    count - done < PANEL_COUNT ? count - done : PANEL_COUNT,
                    y + done * stride + (tile - begin) * TILE, stride);
}

#include "int4_rows.h"
#include "dense_rows.h"

const struct int4_routines ROUTINES = {quantise, multiply, swiglu, mix, dense, norm, add, sigmoid_of};
