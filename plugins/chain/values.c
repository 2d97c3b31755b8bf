#include "call.h"

#include <stdlib.h>

void fail(struct call *c, const char *what) {
  if (!c->status) c->status = failure(c->api, ORT_INVALID_ARGUMENT, "Chain: %s", what);
}

int64_t integer(struct call *c) {
  if (c->at == c->end) fail(c, "its steps end early");
  return c->at == c->end ? 0 : *c->at++;
}

float number(struct call *c) {
  if (c->number == c->last_number) fail(c, "its reals end early");
  return c->number == c->last_number ? 0 : *c->number++;
}

float limit_of(struct call *c) {
  float limit = number(c);
  return limit > 0 ? limit : __builtin_inff();
}

const struct tensor *value(struct call *c) {
  static const struct tensor none;
  int64_t index = integer(c);
  if (!c->status && (index < 0 || (size_t)index >= c->values)) fail(c, "a step takes a value that is not there");
  if (c->status) return &none;
  return (size_t)index < c->self->inputs && c->self->is_fixed[index] ? &c->self->fixed[index] : &c->value[index];
}

const struct tensor *activation(struct call *c, const struct tensor *like, int alike_columns) {
  const struct tensor *t = value(c);
  if (!c->status && (t->rank != 2 || t->dims[1] % TILE || (like && t->dims[0] != like->dims[0]) ||
                     (alike_columns && t->dims[1] != like->dims[1])))
    fail(c, "the activations are not [t, width], or do not fit together");
  return t;
}

const float *vector(struct call *c, size_t width) {
  const struct tensor *t = value(c);
  if (!c->status && (t->rank != 1 || t->dims[0] != (int64_t)width)) fail(c, "a vector has another width");
  return t->data;
}

// Many small pieces share one: asking for each costs more than some steps.
void *room(struct call *c, size_t bytes) {
  bytes = (bytes + 63) / 64 * 64;
  if (c->status) return NULL;
  if (bytes > c->left) {
    size_t size = bytes > SHARED_ROOM ? bytes : SHARED_ROOM;
    char *more = aligned_alloc(64, size);
    if (!more) {
      c->status = failure(c->api, ORT_FAIL, "Chain: no memory for %zu bytes", size);
      return NULL;
    }
    c->room[c->kept++] = more;
    if (bytes > SHARED_ROOM) return more;
    c->free = more;
    c->left = size;
  }
  c->free += bytes;
  c->left -= bytes;
  return c->free - bytes;
}

float *made(struct call *c, int64_t rows, int64_t width) {
  if (c->values == MOST_VALUES) fail(c, "it has too many values");
  if (c->status) return NULL;
  struct tensor *t = &c->value[c->values];
  *t = (struct tensor){.dims = {rows, width}, .rank = 2};
  int output = c->output_of[c->values++];
  if (output < 0) {
    t->data = room(c, (size_t)(rows * width) * sizeof(float));
  } else {
    float *data = NULL;
    c->status = tensor_output(c->api, c->context, (size_t)output, t->dims, 2, &data);
    t->data = data;
  }
  return t->data;
}
