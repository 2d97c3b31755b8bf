#include "linear.h"

#include <string.h>

enum {
  GROUP = 4,       // tiles, or fp32 rows, that a unit reads side by side
  SHORT_ROWS = 64,
  SLICE = 1024,    // columns quantised at once, a multiple of every block
};

static size_t slices(const struct linear *l) { return (l->columns + SLICE - 1) / SLICE; }

void linear_plan(struct linear *l) {
  l->quantise_units = l->rows.count * slices(l);
  l->multiply_units = l->bytes = 0;
  for (struct product *p = l->products; p < l->products + l->count; p++) {
    size_t tiles = (p->width + TILE - 1) / TILE, streams = p->dense ? p->width : tiles;
    p->units = (streams + GROUP - 1) / GROUP;
    l->multiply_units += p->units;
    l->bytes += p->dense ? p->width * l->columns * sizeof(float) : tiles * tile_bytes(l->columns);
  }
}

void linear_quantise(void *linear, size_t begin, size_t end) {
  const struct linear *l = linear;
  for (size_t unit = begin; unit < end; unit++) {
    size_t row = unit / slices(l), first = unit % slices(l) * SLICE, at = row * l->columns + first;
    size_t width = l->columns - first < SLICE ? l->columns - first : SLICE;
    const float *x = l->x + at;
    float h[SLICE];
    if (l->up) {
      l->routines->swiglu(x, l->up + at, TILE, width / TILE, l->limit, h);
      x = h;
    }
    l->routines->quantise(x, first, width, &l->rows, row);
  }
}

// The last tile where some of its rows are padding: y has no room for those.
static void last_tile(const struct linear *l, const struct product *p) {
  size_t tile = p->width / TILE, filled = p->width % TILE;
  for (size_t done = 0; done < l->rows.count; done += SHORT_ROWS) {
    float whole[SHORT_ROWS * TILE];
    size_t rows = l->rows.count - done < SHORT_ROWS ? l->rows.count - done : SHORT_ROWS;
    l->routines->multiply(&p->w, tile, tile + 1, &l->rows, done, rows, whole, TILE);
    for (size_t t = 0; t < rows; t++)
      memcpy(p->y + (done + t) * p->width + tile * TILE, whole + t * TILE, filled * sizeof *whole);
  }
}

// Units begin .. end - 1 of one product.
static void multiply_one(const struct linear *l, const struct product *p, size_t begin, size_t end) {
  size_t first = begin * GROUP, last = end * GROUP;
  if (p->dense) {
    if (last > p->width) last = p->width;
    l->routines->dense(p->dense + first * l->columns, last - first, l->columns, l->x, l->rows.count, p->y + first,
                       p->width);
    return;
  }
  size_t whole = p->width / TILE;
  if (last > whole) {
    last = whole;
    if (p->width % TILE) last_tile(l, p);
  }
  if (first < last)
    l->routines->multiply(&p->w, first, last, &l->rows, 0, l->rows.count, p->y + first * TILE, p->width);
}

void linear_multiply(void *linear, size_t begin, size_t end) {
  const struct linear *l = linear;
  for (const struct product *p = l->products; begin < end; p++) {
    size_t stop = end < p->units ? end : p->units;
    if (begin < stop) multiply_one(l, p, begin, stop);
    begin = begin > p->units ? begin - p->units : 0;
    end = end > p->units ? end - p->units : 0;
  }
}

size_t linear_ask(void *linear, size_t unit, size_t done) {
  const struct linear *l = linear;
  const struct product *p = l->products;
  for (; unit >= p->units; p++) unit -= p->units;
  size_t first = unit * GROUP, streams = p->dense ? p->width : (p->width + TILE - 1) / TILE;
  size_t last = first + GROUP < streams ? first + GROUP : streams;
  if (!p->dense) return ask_tiles(&p->w, first, last, done);
  return ask_bytes(p->dense + first * l->columns, (last - first) * l->columns * sizeof(float), done);
}
