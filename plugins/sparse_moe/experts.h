// The chosen experts of each token: routing, two products each, and the mix.
#ifndef STEP35_EXPERTS_H
#define STEP35_EXPERTS_H

#include "../cpu/int4.h"
#include "../cpu/work.h"
#include "routing.h"

struct experts {
  const struct int4_routines *routines;
  const float *x, *selection, *weights;
  // Where logits are given selection and weights are made of them: sigmoid, and that plus the bias.
  const float *logits, *bias;
  float *y;
  size_t tokens, experts, top_k, d, inner;
  float scale, limit;
  struct int4_matrix gate_up, down;
  struct int8_rows given;        // of the tokens
  struct int8_rows rows, hidden; // of the (expert, token) pairs: an expert's lie side by side
  struct routing routing;
  size_t one, gathered, gate_up_units, down_units, bytes;
};

enum { EXPERTS_TASKS = 5 };

// Memory that the tasks need, and the tasks. What `x` and logits hold is read by the tasks only.
size_t experts_size(struct experts *e);
void experts_plan(struct experts *e, void *room, struct task tasks[EXPERTS_TASKS]);

#endif
