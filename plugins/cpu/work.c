#include "work.h"

#include <sched.h>
#include <stdatomic.h>
#include <unistd.h>

enum {
  MOST_WORKERS = 64,
  WORTH_A_THREAD = 64 << 10, // bytes: below, waking another thread takes longer than the work
};

struct progress {
  _Alignas(64) _Atomic size_t taken;
  _Alignas(64) _Atomic size_t done;
};

struct plan {
  const struct phase *phases;
  size_t count, workers;
  void *argument;
  struct progress progress[MOST_PHASES];
};

static void pause_briefly(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Runs are long at first, for streaming, and single units at the end, so that all workers finish together.
static size_t take(struct progress *p, size_t units, size_t workers, size_t *begin) {
  size_t at = atomic_load_explicit(&p->taken, memory_order_relaxed);
  for (;;) {
    if (at >= units) return 0;
    size_t share = (units - at) / (2 * workers), run = share ? share : 1;
    if (atomic_compare_exchange_weak(&p->taken, &at, at + run)) {
      *begin = at;
      return run;
    }
  }
}

static void work(void *argument, size_t worker) {
  struct plan *plan = argument;
  (void)worker;
  for (size_t i = 0; i < plan->count; i++) {
    const struct phase *phase = &plan->phases[i];
    struct progress *p = &plan->progress[i];
    size_t begin, run;
    while ((run = take(p, phase->units, plan->workers, &begin))) {
      phase->run(plan->argument, begin, begin + run);
      atomic_fetch_add(&p->done, run);
    }
    // Whatever is not done was taken by a worker that is running, so this ends.
    for (unsigned spins = 0; i + 1 < plan->count && atomic_load(&p->done) < phase->units; spins++)
      if (spins < 4096)
        pause_briefly();
      else
        sched_yield();
  }
}

ort_status *do_phases(const ort_api *api, const ort_kernel_context *context, const struct phase *phases,
                      size_t count, size_t bytes, void *argument) {
  long processors = sysconf(_SC_NPROCESSORS_ONLN);
  size_t workers = processors < 1 ? 1 : (size_t)processors;
  if (workers > bytes / WORTH_A_THREAD + 1) workers = bytes / WORTH_A_THREAD + 1;
  if (workers > MOST_WORKERS) workers = MOST_WORKERS;
  struct plan plan = {.phases = phases, .count = count, .workers = workers, .argument = argument};
  if (workers == 1) {
    work(&plan, 0);
    return NULL;
  }
  return ort_parallel_for(api)(context, work, workers, workers, &plan);
}
