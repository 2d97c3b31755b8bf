// One call of a chain: its values, its memory, and its steps as tasks.
#ifndef STEP35_CHAIN_CALL_H
#define STEP35_CHAIN_CALL_H

#include "../cpu/op.h"
#include "../cpu/work.h"

enum { MOST_BUFFERS = 128 };

struct row_group;

struct state {
  const ort_api *api;
  enum isa isa;
  size_t ints, reals, outputs, inputs;
  size_t values, tasks; // the most there can be
  int64_t *steps, *results;
  float *numbers;
  // What does not change from call to call is asked for once: an input costs the runtime several misses.
  struct tensor *fixed;
  uint8_t *is_fixed;
  int32_t *output_of;           // which output a value is, or -1
  _Atomic(struct call *) spare; // of the call before, for the next: fresh memory costs a fault a page
};

// Memory of a call. What is dropped can be had again by the tasks that follow, but not by the last one so far if
// that is a group of rows: it does one row after the other, so rows of other widths would overlap.
struct buffer {
  void *data;
  size_t bytes;
  enum { FREE, HELD, DROPPED } use;
};

struct call {
  const struct state *self;
  const ort_api *api;
  ort_kernel_context *context;
  ort_status *status; // the first failure; after it nothing is done
  const int64_t *at, *end; // of the steps, as they are read
  const float *number, *last_number;
  size_t values, tasks, bytes, buffers, dropped;
  struct row_group *group; // where the last task is one
  char *free;              // what is left for small pieces
  size_t left;
  struct tensor *value;
  struct task *task;
  struct buffer buffer[MOST_BUFFERS];
};

// What the next of the steps' integers and reals say. After a failure they give zeros and empty values.
int64_t integer(struct call *c);
float number(struct call *c);
float limit_of(struct call *c); // infinite where there is none

// The value that the next integer names.
const struct tensor *value(struct call *c);

// The same where it is a matrix of whole vectors, with the rows and the columns of `like` where that is given.
const struct tensor *activation(struct call *c, const struct tensor *like, int alike_columns);

// The same where it is a vector.
const float *vector(struct call *c, size_t width);

void fail(struct call *c, const char *what);

// A new value; null after a failure.
float *made(struct call *c, int64_t rows, int64_t width);

// A new value that is `from` with some rows written: an output, which may lie where `from` does.
float *written(struct call *c, const struct tensor *from);

// Reads the steps and turns them into tasks.
void read_steps(struct call *c);

// A call's own memory, to be used by one call after the other; null where there is none.
struct call *call_new(const struct state *self);
void call_begin(struct call *c, const struct state *self, ort_kernel_context *context);
void call_end(struct call *c);
void call_free(struct call *c);

// Memory, aligned to 64 bytes, that tasks write and read; null after a failure. Nothing may be written there while
// steps are read: what is dropped goes to later steps before any task has run.
void *room(struct call *c, size_t bytes);
void drop(struct call *c, const void *data);

// Everything that was dropped can be had again.
void reuse_dropped(struct call *c);

// Memory until the call ends, not cleared.
void *piece(struct call *c, size_t bytes);

#endif
