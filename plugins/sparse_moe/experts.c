#include "experts.h"

#include <string.h>

enum {
  FEATURES = 128, // an expert's features done at once: whole blocks, so that they can be quantised in place
  COLUMNS = 64,   // columns of the result done at once
  SOME_ROWS = 64, // rows of one expert done at once
};

static size_t slices(const struct experts *e) { return (e->inner + FEATURES - 1) / FEATURES; }

// One expert's rows of all, by block among themselves: it reads them again and again, so they lie together.
static struct int8_rows rows_of(const struct int8_rows *all, size_t columns, const struct used *used) {
  size_t blocks = columns / all->block;
  return (struct int8_rows){all->codes + used->first * columns, all->scales + used->first * blocks,
                            all->offsets + used->first * blocks, used->count, all->block};
}

// Unit: all of it.
static void choose_experts(void *argument, size_t begin, size_t end) {
  struct experts *c = argument;
  (void)begin, (void)end;
  if (c->logits)
    for (size_t t = 0; t < c->tokens; t++) {
      float *weights = (float *)c->weights + t * c->experts, *selection = (float *)c->selection + t * c->experts;
      c->routines->sigmoid(c->logits + t * c->experts, c->experts, weights);
      c->routines->add(weights, c->bias, c->experts, selection);
    }
  route(c->selection, c->weights, c->tokens, c->experts, c->top_k, c->scale, &c->routing);
  c->gathered = c->tokens > 1 ? c->routing.used_count : 0;
  // Others ask for what these units read as soon as there are some.
  __atomic_store_n(&c->gate_up_units, c->routing.used_count * slices(c), __ATOMIC_RELEASE);
}

// Unit: a token.
static void quantise(void *argument, size_t begin, size_t end) {
  const struct experts *c = argument;
  for (size_t t = begin; t < end; t++) c->routines->quantise(c->x + t * c->d, 0, c->d, &c->given, t);
}

// Unit: a used expert's tokens. One token's rows are the same for all experts and stay where they are.
static void gather(void *argument, size_t begin, size_t end) {
  const struct experts *c = argument;
  size_t block = c->given.block;
  for (size_t unit = begin; unit < end; unit++) {
    const struct used *used = &c->routing.used[unit];
    struct int8_rows to = rows_of(&c->rows, c->d, used);
    for (size_t b = 0; b < c->d / block; b++)
      for (size_t i = 0; i < used->count; i++) {
        size_t place = b * used->count + i, from = b * c->tokens + (size_t)c->routing.token[used->first + i];
        memcpy(to.codes + place * block, c->given.codes + from * block, block);
        to.scales[place] = c->given.scales[from];
        to.offsets[place] = c->given.offsets[from];
      }
  }
}

// Unit: a slice of one used expert's features, for all its tokens.
static void gate_and_up(void *argument, size_t begin, size_t end) {
  const struct experts *c = argument;
  for (size_t unit = begin; unit < end; unit++) {
    const struct used *used = &c->routing.used[unit / slices(c)];
    size_t first = unit % slices(c) * FEATURES, follower = unit + 1 < end ? unit + 1 : unit;
    struct int4_matrix w = matrix_at(&c->gate_up, 2 * c->inner / TILE, (size_t)used->expert,
                                     (size_t)c->routing.used[follower / slices(c)].expert,
                                     follower % slices(c) * 2 * FEATURES / TILE);
    struct int8_rows x = c->tokens > 1 ? rows_of(&c->rows, c->d, used) : c->given;
    struct int8_rows hidden = rows_of(&c->hidden, c->inner, used);
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
  const struct experts *c = argument;
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

static size_t ask_gate_and_up(void *argument, size_t unit, size_t done) {
  const struct experts *c = argument;
  size_t expert = (size_t)c->routing.used[unit / slices(c)].expert, tiles = 2 * c->inner / TILE;
  size_t first = unit % slices(c) * 2 * FEATURES / TILE;
  size_t last = first + 2 * FEATURES / TILE < tiles ? first + 2 * FEATURES / TILE : tiles;
  return ask_tiles(&c->gate_up, expert * tiles + first, expert * tiles + last, done);
}

// The experts' parts of a unit come one after the other.
static size_t ask_down(void *argument, size_t unit, size_t done) {
  const struct experts *c = argument;
  size_t tiles = c->d / TILE, first = unit * COLUMNS / TILE;
  size_t last = first + COLUMNS / TILE < tiles ? first + COLUMNS / TILE : tiles;
  size_t part = (last - first) * (tile_bytes(c->inner) + tile_scales(&c->down) * sizeof(uint16_t));
  if (done / part >= c->routing.used_count) return 0;
  size_t at = (size_t)c->routing.used[done / part].expert * tiles;
  return ask_tiles(&c->down, at + first, at + last, done % part);
}

// Rows of the tokens, of the pairs and of what is between the two products; then scores; then routing.
static void rows_kept(struct experts *c, struct int8_rows *kept[3], size_t counts[3], size_t widths[3]) {
  size_t pairs = c->tokens * c->top_k;
  kept[0] = &c->given, kept[1] = &c->rows, kept[2] = &c->hidden;
  counts[0] = c->tokens, counts[1] = c->tokens > 1 ? pairs : 0, counts[2] = pairs;
  widths[0] = widths[1] = c->d, widths[2] = c->inner;
}

size_t experts_size(struct experts *c) {
  struct int8_rows *kept[3];
  size_t counts[3], widths[3], scores = c->logits ? 2 * c->tokens * c->experts * sizeof(float) : 0;
  rows_kept(c, kept, counts, widths);
  size_t total = routing_size(c->tokens, c->experts, c->top_k) + scores;
  for (size_t i = 0; i < 3; i++) total += rows_size(counts[i], widths[i], c->down.block);
  return total;
}

void experts_plan(struct experts *c, void *memory, struct task tasks[EXPERTS_TASKS]) {
  struct int8_rows *kept[3];
  size_t counts[3], widths[3], block = c->down.block, scores = c->tokens * c->experts;
  char *room = memory;
  rows_kept(c, kept, counts, widths);
  for (size_t i = 0; i < 3; i++) {
    rows_in(room, counts[i], widths[i], block, kept[i]);
    room += rows_size(counts[i], widths[i], block);
  }
  if (c->logits) {
    c->weights = (float *)room;
    c->selection = c->weights + scores;
    room += 2 * scores * sizeof(float);
  }
  routing_in(room, c->tokens, c->experts, c->top_k, &c->routing);
  c->one = 1;
  c->gathered = c->gate_up_units = 0;
  c->down_units = (c->d + COLUMNS - 1) / COLUMNS;
  c->bytes = (counts[2] < c->experts ? counts[2] : c->experts) * c->inner * c->d * 3 / 2;
  tasks[0] = (struct task){choose_experts, c, &c->one, NULL, {0}};
  tasks[1] = (struct task){quantise, c, &c->tokens, NULL, {0}};
  tasks[2] = (struct task){gather, c, &c->gathered, NULL, {0}};
  tasks[3] = (struct task){gate_and_up, c, &c->gate_up_units, ask_gate_and_up, {0}};
  tasks[4] = (struct task){down_and_mix, c, &c->down_units, ask_down, {0}};
}
