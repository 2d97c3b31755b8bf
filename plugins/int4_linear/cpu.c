// Int4Linear(x [t, K] f32, weight u8, scales f16) -> [t, N] f32. Attributes: N, block.
//
// x is quantised to int8 by block of each row; weight [ceil(N/16), K/8, 64] and scales [ceil(N/16), K/block,
// 16] are laid out as cpu/int4.h says, rows from N on being padding.
#include <stdlib.h>
#include <string.h>

#include "../cpu/int4.h"
#include "../cpu/op.h"
#include "../cpu/work.h"

enum { GROUP = 4, SHORT_ROWS = 64 };

struct linear {
  const ort_api *api;
  const struct int4_routines *routines;
  int64_t width, block;
};

struct call {
  const struct int4_routines *routines;
  struct int4_matrix w;
  struct int8_rows rows;
  const float *x;
  float *y;
  size_t width; // N
};

static void quantise(void *argument, size_t begin, size_t end) {
  const struct call *c = argument;
  for (size_t row = begin; row < end; row++)
    c->routines->quantise(c->x + row * c->w.columns, 0, c->w.columns, &c->rows, row);
}

// The last tile where some of its rows are padding: y has no room for those.
static void last_tile(const struct call *c) {
  size_t tile = c->width / TILE, filled = c->width % TILE;
  for (size_t done = 0; done < c->rows.count; done += SHORT_ROWS) {
    float whole[SHORT_ROWS * TILE];
    size_t rows = c->rows.count - done < SHORT_ROWS ? c->rows.count - done : SHORT_ROWS;
    c->routines->multiply(&c->w, tile, tile + 1, &c->rows, done, rows, whole, TILE);
    for (size_t t = 0; t < rows; t++)
      memcpy(c->y + (done + t) * c->width + tile * TILE, whole + t * TILE, filled * sizeof *whole);
  }
}

static void multiply(void *argument, size_t begin, size_t end) {
  const struct call *c = argument;
  size_t whole = c->width / TILE, first = begin * GROUP, last = end * GROUP;
  if (last > whole) {
    last = whole;
    if (c->width % TILE) last_tile(c);
  }
  if (first < last)
    c->routines->multiply(&c->w, first, last, &c->rows, 0, c->rows.count, c->y + first * TILE, c->width);
}

static ort_status *create(const ort_op *op, const ort_api *api, const ort_kernel_info *info, void **kernel) {
  (void)op;
  struct linear made = {.api = api};
  ort_status *status = choose_routines(api, &made.routines);
  if (!status) status = ort_attribute_int(api)(info, "N", &made.width);
  if (!status) status = block_attribute(api, info, &made.block);
  return status ? status : keep(api, &made, sizeof made, kernel);
}

static ort_status *compute(void *kernel, ort_kernel_context *context) {
  const struct linear *self = kernel;
  const ort_api *api = self->api;
  struct tensor x, weight, scales;
  ort_status *status = tensor_input(api, context, 0, &x);
  if (!status) status = tensor_input(api, context, 1, &weight);
  if (!status) status = tensor_input(api, context, 2, &scales);
  if (status) return status;
  if (x.rank != 2) return failure(api, ORT_INVALID_ARGUMENT, "Int4Linear: x has %zu dimensions", x.rank);
  struct call c = {.routines = self->routines, .x = x.data, .width = (size_t)self->width};
  status = matrix_of(api, "Int4Linear", &weight, &scales, 0, self->width, x.dims[1], self->block, &c.w);
  if (!status) status = tensor_output(api, context, (int64_t[]){x.dims[0], self->width}, 2, &c.y);
  if (status || !x.dims[0] || !self->width) return status;

  void *room = rows_room((size_t)x.dims[0], c.w.columns, c.w.block, &c.rows);
  if (!room) return failure(api, ORT_FAIL, "Int4Linear: no memory for %zu rows", c.rows.count);
  size_t tiles = (c.width + TILE - 1) / TILE;
  const struct phase phases[] = {{quantise, c.rows.count}, {multiply, (tiles + GROUP - 1) / GROUP}};
  status = do_phases(api, context, phases, 2, tiles * tile_bytes(c.w.columns), &c);
  free(room);
  return status;
}

static const char *name(const ort_op *op) { return (void)op, "Int4Linear"; }
static size_t inputs(const ort_op *op) { return (void)op, 3; }
static int input_type(const ort_op *op, size_t index) {
  return (void)op, (const int[]){ORT_FLOAT, ORT_UINT8, ORT_FLOAT16}[index];
}

const ort_op int4_linear_op = {OP_COMMON, .name = name, .input_count = inputs, .input_type = input_type,
                               .create_checked = create, .compute_checked = compute};
