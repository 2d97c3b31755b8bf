// Work in phases on ONNX Runtime's own threads.
#ifndef STEP35_WORK_H
#define STEP35_WORK_H

#include <stdatomic.h>

#include "ort_api.h"

// `run` does units begin .. end - 1 of one phase. Phases are done one after the other.
struct phase {
  void (*run)(void *argument, size_t begin, size_t end);
  size_t units;
};

enum { MOST_PHASES = 4 };

// `bytes` is about how much memory the phases read: little work stays on the calling thread.
ort_status *do_phases(const ort_api *api, const ort_kernel_context *context, const struct phase *phases,
                      size_t count, size_t bytes, void *argument);

// What workers share of a task.
struct progress {
  _Atomic size_t taken, done;
  _Atomic uint64_t owned; // by bit: the workers whose own units are taken
};

// A phase with an argument of its own. One line of memory: at the start of a call every line is a miss.
struct task {
  _Alignas(64) void (*run)(void *argument, size_t begin, size_t end);
  void *argument;
  const size_t *units; // counts when the task before is done; until it is known, 0
  // Asks for some of the memory that `unit` reads first, from its byte `done` on, and says how much; 0: there is
  // no more. A worker with nothing to do calls it ahead of time, so that memory is never idle. May be null.
  size_t (*ask)(void *argument, size_t unit, size_t done);
  struct progress progress; // zero before
};

// As `do_phases`.
ort_status *do_tasks(const ort_api *api, const ort_kernel_context *context, struct task *tasks, size_t count,
                     size_t bytes);

#endif
