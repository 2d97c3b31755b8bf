// One call of a chain: its values, and its steps as tasks.
#ifndef STEP35_CHAIN_CALL_H
#define STEP35_CHAIN_CALL_H

#include "../cpu/op.h"
#include "../cpu/work.h"
#include "../int4_linear/linear.h"
#include "../sparse_moe/experts.h"
#include "rows.h"

enum { MOST_STEPS = 24, MOST_MIXES = 2, MOST_VALUES = 128, MOST_INTS = 512, MOST_REALS = 64, MOST_ROW_STEPS = 64 };
enum { SHARED_ROOM = 128 << 10 };

struct state {
  const ort_api *api;
  const struct int4_routines *routines;
  size_t ints, reals, outputs, inputs;
  int64_t steps[MOST_INTS], results[MOST_VALUES];
  float numbers[MOST_REALS];
  // What does not change from call to call is asked for once: an input costs the runtime several misses.
  struct tensor fixed[MOST_VALUES];
  uint8_t is_fixed[MOST_VALUES];
};

struct call {
  const struct state *self;
  const ort_api *api;
  ort_kernel_context *context;
  ort_status *status; // the first failure; after it nothing is done
  const int64_t *at, *end; // of the steps, as they are read
  const float *number, *last_number;
  size_t values, tasks, groups, row_steps, linears, mixes, kept, bytes;
  char *free; // what is left of the shared room
  size_t left;
  // Nothing from here on is cleared: a call would wait for memory it does not use.
  int16_t output_of[MOST_VALUES]; // which output a value is, or -1
  struct tensor value[MOST_VALUES];
  struct task task[MOST_TASKS];
  struct row_group group[MOST_STEPS];
  struct row_step row_step[MOST_ROW_STEPS];
  struct linear linear[MOST_STEPS];
  struct experts experts[MOST_MIXES];
  void *room[MOST_VALUES + MOST_STEPS];
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

// Memory until the call ends; null after a failure.
void *room(struct call *c, size_t bytes);

// A new value.
float *made(struct call *c, int64_t rows, int64_t width);

// Turns the steps into tasks.
void read_steps(struct call *c);

#endif
