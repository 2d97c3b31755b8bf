// Int4Experts(x [t, D], selection [t, E], weights [t, E] f32, gate_up u8, gate_up_scales f16, down u8,
// down_scales f16) -> [t, D] f32. Attributes: block, top_k, scale, limit (0: none).
//
// For each token the `top_k` experts with the highest selection (of equals the first), mixed by their weights
// over (their sum + 1e-20), times `scale`. An expert is down(min(silu(gate x), limit) * clamp(up x, limit)).
// gate_up [E, 2 I / 16, D / 8, 64] has tiles of 16 gate rows and the 16 up rows of the same features in turn.
//
// Sums over experts go in ascending order for every token, so a token's row does not depend on the others.
#include <stdlib.h>
#include <string.h>

#include "../cpu/int4.h"
#include "../cpu/op.h"
#include "../cpu/work.h"
#include "routing.h"

enum {
  FEATURES = 128, // an expert's features done at once: whole blocks, so that they can be quantised in place
  COLUMNS = 64,   // columns of the result done at once
  SOME_ROWS = 64, // rows of one expert done at once
};

struct experts {
  const ort_api *api;
  const struct int4_routines *routines;
  int64_t block, top_k;
  float scale, limit;
};

struct call {
  const struct int4_routines *routines;
  const float *x;
  float *y;
  size_t d, inner, slices; // slices: of an expert's features
  float limit;
  struct int4_matrix gate_up, down;
  struct int8_rows rows, hidden; // of the (expert, token) pairs: an expert's lie side by side
  struct routing routing;
};

// One expert's rows of all, by block among themselves: it reads them again and again, so they lie together.
static struct int8_rows rows_of(const struct int8_rows *all, size_t columns, const struct used *used) {
  size_t blocks = columns / all->block;
  return (struct int8_rows){all->codes + used->first * columns, all->scales + used->first * blocks,
                            all->offsets + used->first * blocks, used->count, all->block};
}

// Unit: a used expert's tokens.
static void quantise(void *argument, size_t begin, size_t end) {
  const struct call *c = argument;
  for (size_t unit = begin; unit < end; unit++) {
    const struct used *used = &c->routing.used[unit];
    struct int8_rows rows = rows_of(&c->rows, c->d, used);
    for (size_t i = 0; i < used->count; i++)
      c->routines->quantise(c->x + (size_t)c->routing.token[used->first + i] * c->d, 0, c->d, &rows, i);
  }
}

// Unit: a slice of one used expert's features, for all its tokens.
static void gate_and_up(void *argument, size_t begin, size_t end) {
  const struct call *c = argument;
  for (size_t unit = begin; unit < end; unit++) {
    const struct used *used = &c->routing.used[unit / c->slices];
    size_t first = unit % c->slices * FEATURES, follower = unit + 1 < end ? unit + 1 : unit;
    struct int4_matrix w = matrix_at(&c->gate_up, 2 * c->inner / TILE, (size_t)used->expert,
                                     (size_t)c->routing.used[follower / c->slices].expert,
                                     follower % c->slices * 2 * FEATURES / TILE);
    struct int8_rows x = rows_of(&c->rows, c->d, used), hidden = rows_of(&c->hidden, c->inner, used);
    size_t width = c->inner - first < FEATURES ? c->inner - first : FEATURES;
    for (size_t done = 0; done < used->count; done += SOME_ROWS) {
      float both[SOME_ROWS * 2 * FEATURES], h[FEATURES];
      size_t rows = used->count - done < SOME_ROWS ? used->count - done : SOME_ROWS;
      c->routines->multiply(&w, 2 * first / TILE, 2 * (first + width) / TILE, &x, done, rows, both, 2 * FEATURES);
      for (size_t i = 0; i < rows; i++) {
        const float *pairs = both + i * 2 * FEATURES;
        c->routines->swiglu(pairs, pairs + TILE, 2 * TILE, width / TILE, c->limit, h);
        c->routines->quantise(h, first, width, &hidden, done + i);
      }
    }
  }
}

// Unit: some columns of the result, over all used experts.
static void down_and_mix(void *argument, size_t begin, size_t end) {
  const struct call *c = argument;
  const struct routing *r = &c->routing;
  for (size_t unit = begin; unit < end; unit++) {
    size_t first = unit * COLUMNS, width = c->d - first < COLUMNS ? c->d - first : COLUMNS;
    for (size_t e = 0; e < r->used_count; e++) {
      // After the last expert come the next columns of the first.
      const struct used *used = &r->used[e], *follower = &r->used[e + 1 < r->used_count ? e + 1 : 0];
      struct int4_matrix w = matrix_at(&c->down, c->d / TILE, (size_t)used->expert, (size_t)follower->expert,
                                       (e + 1 < r->used_count ? first : (unit + 1) * COLUMNS) / TILE);
      struct int8_rows hidden = rows_of(&c->hidden, c->inner, used);
      for (size_t done = 0; done < used->count; done += SOME_ROWS) {
        float part[SOME_ROWS * COLUMNS];
        size_t rows = used->count - done < SOME_ROWS ? used->count - done : SOME_ROWS;
        c->routines->multiply(&w, first / TILE, (first + width) / TILE, &hidden, done, rows, part, COLUMNS);
        for (size_t i = 0, pair = used->first + done; i < rows; i++, pair++)
          c->routines->mix(part + i * COLUMNS, width, r->weight[pair], r->more[pair],
                           c->y + (size_t)r->token[pair] * c->d + first);
      }
    }
  }
}

static ort_status *create(const ort_op *op, const ort_api *api, const ort_kernel_info *info, void **kernel) {
  (void)op;
  struct experts made = {.api = api};
  enum isa isa;
  ort_status *status = choose_isa(api, &isa);
  if (!status) made.routines = int4_routines[isa];
  if (!status) status = block_attribute(api, info, &made.block);
  if (!status) status = ort_attribute_int(api)(info, "top_k", &made.top_k);
  if (!status) status = ort_attribute_float(api)(info, "scale", &made.scale);
  if (!status) status = ort_attribute_float(api)(info, "limit", &made.limit);
  if (!status && made.top_k < 1) status = failure(api, ORT_INVALID_ARGUMENT, "Int4Experts: top_k is below 1");
  return status ? status : keep(api, &made, sizeof made, kernel);
}

static ort_status *compute(void *kernel, ort_kernel_context *context) {
  static const char *const op = "Int4Experts";
  const struct experts *self = kernel;
  const ort_api *api = self->api;
  struct tensor in[7];
  for (size_t i = 0; i < 7; i++) {
    ort_status *status = tensor_input(api, context, i, &in[i]);
    if (status) return status;
  }
  const int64_t *x = in[0].dims, *selection = in[1].dims, *weights = in[2].dims;
  int64_t t = x[0], d = x[1], experts = selection[1], inner = in[5].rank == 4 ? in[5].dims[2] * 8 : 0;
  if (in[0].rank != 2 || in[1].rank != 2 || in[2].rank != 2 || selection[0] != t || weights[0] != t ||
      weights[1] != experts || self->top_k > experts || d % TILE || inner % TILE)
    return failure(api, ORT_INVALID_ARGUMENT, "%s: x, selection, weights, widths and top_k do not fit together", op);
  struct call c = {.routines = self->routines, .x = in[0].data, .d = (size_t)d, .inner = (size_t)inner};
  c.limit = self->limit > 0 ? self->limit : __builtin_inff();
  c.slices = (c.inner + FEATURES - 1) / FEATURES;
  ort_status *status = matrix_of(api, op, &in[3], &in[4], experts, 2 * inner, d, self->block, &c.gate_up);
  if (!status) status = matrix_of(api, op, &in[5], &in[6], experts, d, inner, self->block, &c.down);
  if (!status) status = tensor_output(api, context, 0, x, 2, &c.y);
  if (status || !t || !d) return status;

  size_t pairs = (size_t)t * (size_t)self->top_k;
  void *routing = route(in[1].data, in[2].data, (size_t)t, (size_t)experts, (size_t)self->top_k, self->scale,
                        &c.routing);
  void *rows = rows_room(pairs, c.d, c.down.block, &c.rows);
  void *hidden = rows_room(pairs, c.inner, c.down.block, &c.hidden);
  if (routing && rows && hidden) {
    const struct phase phases[] = {{quantise, c.routing.used_count},
                                   {gate_and_up, c.routing.used_count * c.slices},
                                   {down_and_mix, (c.d + COLUMNS - 1) / COLUMNS}};
    status = do_phases(api, context, phases, 3, c.routing.used_count * c.inner * c.d * 3 / 2, &c);
  } else {
    status = failure(api, ORT_FAIL, "%s: no memory for %zu rows", op, pairs);
  }
  free(routing);
  free(rows);
  free(hidden);
  return status;
}

static const char *name(const ort_op *op) { return (void)op, "Int4Experts"; }
static size_t inputs(const ort_op *op) { return (void)op, 7; }
static int input_type(const ort_op *op, size_t index) {
  static const int types[] = {ORT_FLOAT, ORT_FLOAT, ORT_FLOAT, ORT_UINT8, ORT_FLOAT16, ORT_UINT8, ORT_FLOAT16};
  return (void)op, types[index];
}

const ort_op int4_experts_op = {OP_PLAIN, .name = name, .input_count = inputs, .output_count = one_output,
                                .input_type = input_type, .create_checked = create, .compute_checked = compute};
