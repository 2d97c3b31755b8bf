// A call of gated attention: its inputs checked, its memory, and its tasks.
#ifndef STEP35_ATTENTION_PLAN_H
#define STEP35_ATTENTION_PLAN_H

#include "../cpu/isa.h"
#include "../cpu/work.h"
#include "attend.h"

// As cpu.c says.
enum { Q, K, V, GATE, Q_GAMMA, K_GAMMA, FREQUENCIES, KEYS_IN, VALUES_IN, TABLE, STARTS, PASTS, ATTENTION_INPUTS };
enum { ATTENTION_TASKS = 3 };

struct attending {
  const struct attend_routines *routines;
  struct attention a;
  size_t combined, bytes; // bytes: what the call costs, in bytes read in the same time
};

// By `enum isa`.
extern const struct attend_routines *const attend_routines[];

// Checks the inputs, but not what q, k, v and gate hold; of the outputs the caller sets `out`, `keys` and `values`.
ort_status *attention_of(const ort_api *api, const char *op, const struct tensor *const in[ATTENTION_INPUTS],
                         int64_t window, float eps, struct attending *c);

// A cache to write into: `to`, with what `from` holds if that is elsewhere.
float *cache_at(const struct tensor *from, float *to);

// Memory for how the call is cut, which the plan fills in, and for what only the tasks write; aligned for pointers.
size_t attention_cuts(const struct attending *c);
size_t attention_room(const struct attending *c);
void attention_plan(struct attending *c, void *cuts, void *room, struct task tasks[ATTENTION_TASKS]);

#endif
