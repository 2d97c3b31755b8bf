// Int4Linear(x [t, K] f32, then for each product weight u8, scales f16) -> for each product [t, N] f32.
// Int4GatedLinear(gate, up [t, K] f32, weight, scales) -> [t, N], of x = min(silu(gate), limit) * clamp(up, limit).
// Attributes: N, the last product's width, block; limit (0: none).
//
// x is quantised to int8 by block of each row, once for all products; weight [ceil(N/16), K/8, 64] and scales
// [ceil(N/16), K/block, 16] are laid out as cpu/int4.h says. Only the last product's rows may be padded.
#include <stdlib.h>
#include <string.h>

#include "../cpu/int4.h"
#include "../cpu/op.h"
#include "../cpu/work.h"

enum {
  GROUP = 4,       // tiles that a unit reads side by side
  SHORT_ROWS = 64,
  SLICE = 1024,    // columns quantised at once, a multiple of every block
  PRODUCTS = 4,
};

struct linear {
  const ort_api *api;
  const struct int4_routines *routines;
  int64_t width, block;
  float limit;
  int gated;
};

struct product {
  struct int4_matrix w;
  float *y;
  size_t width, units;
};

struct call {
  const struct int4_routines *routines;
  struct int8_rows rows;
  const float *x, *up; // up: null where x is the input itself
  size_t columns, slices;
  float limit;
  struct product products[PRODUCTS];
};

// Unit: a slice of a row.
static void quantise(void *argument, size_t begin, size_t end) {
  const struct call *c = argument;
  for (size_t unit = begin; unit < end; unit++) {
    size_t row = unit / c->slices, first = unit % c->slices * SLICE, at = row * c->columns + first;
    size_t width = c->columns - first < SLICE ? c->columns - first : SLICE;
    const float *x = c->x + at;
    float h[SLICE];
    if (c->up) {
      c->routines->swiglu(x, c->up + at, TILE, width / TILE, c->limit, h);
      x = h;
    }
    c->routines->quantise(x, first, width, &c->rows, row);
  }
}

// The last tile where some of its rows are padding: y has no room for those.
static void last_tile(const struct call *c, const struct product *p) {
  size_t tile = p->width / TILE, filled = p->width % TILE;
  for (size_t done = 0; done < c->rows.count; done += SHORT_ROWS) {
    float whole[SHORT_ROWS * TILE];
    size_t rows = c->rows.count - done < SHORT_ROWS ? c->rows.count - done : SHORT_ROWS;
    c->routines->multiply(&p->w, tile, tile + 1, &c->rows, done, rows, whole, TILE);
    for (size_t t = 0; t < rows; t++)
      memcpy(p->y + (done + t) * p->width + tile * TILE, whole + t * TILE, filled * sizeof *whole);
  }
}

// Unit: GROUP tiles, numbered through all products.
static void multiply(void *argument, size_t begin, size_t end) {
  const struct call *c = argument;
  for (const struct product *p = c->products; begin < end; p++) {
    size_t stop = end < p->units ? end : p->units;
    if (begin < stop) {
      size_t whole = p->width / TILE, first = begin * GROUP, last = stop * GROUP;
      if (last > whole) {
        last = whole;
        if (p->width % TILE) last_tile(c, p);
      }
      if (first < last)
        c->routines->multiply(&p->w, first, last, &c->rows, 0, c->rows.count, p->y + first * TILE, p->width);
    }
    begin = begin > p->units ? begin - p->units : 0;
    end = end > p->units ? end - p->units : 0;
  }
}

static ort_status *make(const ort_api *api, const ort_kernel_info *info, int gated, void **kernel) {
  struct linear made = {.api = api, .gated = gated};
  enum isa isa;
  ort_status *status = choose_isa(api, &isa);
  if (!status) made.routines = int4_routines[isa];
  if (!status) status = ort_attribute_int(api)(info, "N", &made.width);
  if (!status) status = block_attribute(api, info, &made.block);
  if (!status && gated) status = ort_attribute_float(api)(info, "limit", &made.limit);
  return status ? status : keep(api, &made, sizeof made, kernel);
}

static ort_status *create(const ort_op *op, const ort_api *api, const ort_kernel_info *info, void **kernel) {
  return (void)op, make(api, info, 0, kernel);
}

static ort_status *create_gated(const ort_op *op, const ort_api *api, const ort_kernel_info *info, void **kernel) {
  return (void)op, make(api, info, 1, kernel);
}

static ort_status *compute(void *kernel, ort_kernel_context *context) {
  const struct linear *self = kernel;
  const ort_api *api = self->api;
  struct tensor x, up = {0};
  size_t activations = self->gated ? 2 : 1, inputs, count;
  ort_status *status = ort_input_count(api)(context, &inputs);
  if (!status) status = tensor_input(api, context, 0, &x);
  if (!status && self->gated) status = tensor_input(api, context, 1, &up);
  if (status) return status;
  count = (inputs - activations) / 2;
  if (x.rank != 2 || (self->gated && (up.rank != 2 || memcmp(x.dims, up.dims, 2 * sizeof *x.dims))))
    return failure(api, ORT_INVALID_ARGUMENT, "Int4Linear: the activations are not [t, K]");
  if (inputs % 2 != activations % 2 || !count || count > PRODUCTS)
    return failure(api, ORT_INVALID_ARGUMENT, "Int4Linear: %zu inputs", inputs);
  struct call c = {.routines = self->routines, .x = x.data, .up = up.data, .columns = (size_t)x.dims[1]};
  c.limit = self->limit > 0 ? self->limit : __builtin_inff();
  c.slices = (c.columns + SLICE - 1) / SLICE;
  size_t units = 0, bytes = 0;
  for (size_t i = 0; i < count; i++) {
    struct product *p = &c.products[i];
    struct tensor weight, scales;
    status = tensor_input(api, context, activations + 2 * i, &weight);
    if (!status) status = tensor_input(api, context, activations + 2 * i + 1, &scales);
    if (status) return status;
    int64_t width = i + 1 < count ? weight.dims[0] * TILE : self->width;
    status = matrix_of(api, "Int4Linear", &weight, &scales, 0, width, x.dims[1], self->block, &p->w);
    if (!status) status = tensor_output(api, context, i, (int64_t[]){x.dims[0], width}, 2, &p->y);
    if (status) return status;
    size_t tiles = ((size_t)width + TILE - 1) / TILE;
    p->width = (size_t)width;
    p->units = (tiles + GROUP - 1) / GROUP;
    units += p->units;
    bytes += tiles * tile_bytes(c.columns);
  }
  if (!x.dims[0] || !units) return NULL;
  void *room = rows_room((size_t)x.dims[0], c.columns, (size_t)self->block, &c.rows);
  if (!room) return failure(api, ORT_FAIL, "Int4Linear: no memory for %zu rows", c.rows.count);
  const struct phase phases[] = {{quantise, c.rows.count * c.slices}, {multiply, units}};
  status = do_phases(api, context, phases, 2, bytes, &c);
  free(room);
  return status;
}

static const char *name(const ort_op *op) { return (void)op, "Int4Linear"; }
static const char *gated_name(const ort_op *op) { return (void)op, "Int4GatedLinear"; }
static size_t two(const ort_op *op) { return (void)op, 2; }
static size_t four(const ort_op *op) { return (void)op, 4; }
static int variadic_weights(const ort_op *op, size_t index) { return (void)op, index ? ORT_VARIADIC : ORT_REQUIRED; }
static int variadic(const ort_op *op, size_t index) { return (void)op, (void)index, ORT_VARIADIC; }
static int input_type(const ort_op *op, size_t index) { return (void)op, index ? ORT_ANY_TYPE : ORT_FLOAT; }
static int gated_input_type(const ort_op *op, size_t index) {
  return (void)op, (const int[]){ORT_FLOAT, ORT_FLOAT, ORT_UINT8, ORT_FLOAT16}[index];
}

const ort_op int4_linear_op = {OP_COMMON, .name = name, .input_count = two, .output_count = one_output,
                               .input_kind = variadic_weights, .input_alike = none_of, .output_kind = variadic,
                               .input_type = input_type, .create_checked = create, .compute_checked = compute};

const ort_op int4_gated_linear_op = {OP_PLAIN, .name = gated_name, .input_count = four,
                                     .output_count = one_output, .input_type = gated_input_type,
                                     .create_checked = create_gated, .compute_checked = compute};
