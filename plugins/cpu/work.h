// Work in phases on ONNX Runtime's own threads.
#ifndef STEP35_WORK_H
#define STEP35_WORK_H

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

#endif
