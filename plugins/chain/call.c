#include "call.h"

#include <stdlib.h>
#include <string.h>

enum {
  PIECES = 64 << 10,  // bytes shared by small pieces: asking for each costs more than some steps
  KEPT = 128 << 10,   // bytes of a buffer that is kept for the next call: those of one token are
};

struct call *call_new(const struct state *self) {
  struct call *c = malloc(sizeof *c);
  struct tensor *values = malloc((self->values + 1) * sizeof *values);
  struct task *tasks = aligned_alloc(64, (self->tasks + 1) * sizeof *tasks);
  if (!c || !values || !tasks) {
    free(c), free(values), free(tasks);
    return NULL;
  }
  memcpy(values, self->fixed, self->inputs * sizeof *values);
  c->value = values;
  c->task = tasks;
  c->buffers = 0;
  return c;
}

void call_begin(struct call *c, const struct state *self, ort_kernel_context *context) {
  c->self = self;
  c->api = self->api;
  c->context = context;
  c->status = NULL;
  c->at = self->steps;
  c->end = self->steps + self->ints;
  c->number = self->numbers;
  c->last_number = self->numbers + self->reals;
  c->values = self->inputs;
  c->tasks = c->bytes = c->left = c->dropped = 0;
  c->group = NULL;
}

void call_end(struct call *c) {
  size_t kept = 0;
  for (size_t i = 0; i < c->buffers; i++)
    if (c->buffer[i].bytes <= KEPT)
      c->buffer[kept++] = (struct buffer){c->buffer[i].data, c->buffer[i].bytes, FREE};
    else
      free(c->buffer[i].data);
  c->buffers = kept;
}

void call_free(struct call *c) {
  if (!c) return;
  for (size_t i = 0; i < c->buffers; i++) free(c->buffer[i].data);
  free(c->value);
  free(c->task);
  free(c);
}

void *room(struct call *c, size_t bytes) {
  bytes = (bytes + 64) / 64 * 64;
  if (c->status) return NULL;
  struct buffer *best = NULL;
  for (struct buffer *b = c->buffer; b < c->buffer + c->buffers; b++)
    if (b->use == FREE && b->bytes >= bytes && (!best || b->bytes < best->bytes)) best = b;
  if (!best) {
    if (c->buffers == MOST_BUFFERS) {
      fail(c, "it holds too many values at once");
      return NULL;
    }
    void *data = aligned_alloc(64, bytes);
    if (!data) {
      c->status = failure(c->api, ORT_FAIL, "Chain: no memory for %zu bytes", bytes);
      return NULL;
    }
    best = &c->buffer[c->buffers++];
    *best = (struct buffer){data, bytes, FREE};
  }
  best->use = HELD;
  return best->data;
}

void drop(struct call *c, const void *data) {
  for (struct buffer *b = c->buffer; b < c->buffer + c->buffers; b++)
    if (b->data == data && b->use == HELD) {
      b->use = c->group ? DROPPED : FREE;
      c->dropped += b->use == DROPPED;
    }
}

void reuse_dropped(struct call *c) {
  for (size_t i = 0; c->dropped && i < c->buffers; i++)
    if (c->buffer[i].use == DROPPED) {
      c->buffer[i].use = FREE;
      c->dropped--;
    }
}

void *piece(struct call *c, size_t bytes) {
  bytes = (bytes + 63) / 64 * 64;
  if (bytes > c->left) {
    size_t size = bytes > PIECES ? bytes : PIECES;
    c->free = room(c, size);
    c->left = c->free ? size : 0;
    if (!c->free) return NULL;
  }
  c->free += bytes;
  c->left -= bytes;
  return c->free - bytes;
}
