#include "rows.h"

#include <string.h>

static void embed(const struct row_step *s, size_t row) {
  size_t id = (size_t)s->index[row], blocks = s->width / s->block;
  float *to = s->to + row * s->width;
  for (size_t b = 0; b < blocks; b++) {
    const uint8_t *codes = s->codes + id * s->width + b * s->block;
    float scale = s->b[id * blocks + b];
    for (size_t k = 0; k < s->block; k++) to[b * s->block + k] = (float)(codes[k] - 128) * scale;
  }
}

void do_rows(void *row_group, size_t begin, size_t end) {
  const struct row_group *g = row_group;
  const struct int4_routines *routines = g->routines;
  for (size_t row = begin; row < end; row++)
    for (const struct row_step *s = g->step; s < g->step + g->steps; s++) {
      size_t at = row * s->width;
      switch (s->kind) {
        case EMBED_ROW: embed(s, row); break;
        case TAKE_ROW: memcpy(s->to + at, s->a + (size_t)s->index[row] * s->width, s->width * sizeof *s->to); break;
        case ADD_ROW: routines->add(s->a + at, s->b + at, s->width, s->to + at); break;
        case NORM_ROW: routines->norm(s->a + at, s->b, s->width, s->eps, s->to + at); break;
        case QUANTISE_ROW: routines->quantise(s->a + at, 0, s->width, &s->rows, row); break;
      }
    }
}
