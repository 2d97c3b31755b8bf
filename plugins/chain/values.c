#include "call.h"

#include "../gated_attention/plan.h"

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
  return &c->value[index];
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

static struct tensor *next_value(struct call *c) {
  if (c->values == c->self->values) fail(c, "it has too many values");
  return c->status ? NULL : &c->value[c->values++];
}

float *made(struct call *c, int64_t rows, int64_t width) {
  struct tensor *t = next_value(c);
  if (!t) return NULL;
  *t = (struct tensor){.dims = {rows, width}, .rank = 2};
  int output = c->self->output_of[t - c->value];
  if (output < 0) {
    t->data = room(c, (size_t)(rows * width) * sizeof(float));
  } else {
    float *data = NULL;
    c->status = tensor_output(c->api, c->context, (size_t)output, t->dims, 2, &data);
    t->data = data;
  }
  return t->data;
}

float *written(struct call *c, const struct tensor *from) {
  struct tensor *t = next_value(c);
  float *data = NULL;
  int output = t ? c->self->output_of[t - c->value] : 0;
  if (output < 0) fail(c, "a cache is no output");
  if (c->status) return NULL;
  *t = *from;
  c->status = tensor_output(c->api, c->context, (size_t)output, t->dims, t->rank, &data);
  if (!c->status) t->data = cache_at(from, data);
  return t->data;
}
