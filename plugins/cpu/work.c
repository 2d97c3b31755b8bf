#include "work.h"

#include <sched.h>
#include <unistd.h>

enum {
  MOST_WORKERS = 64,
  WORTH_A_THREAD = 64 << 10, // bytes: below, waking another thread takes longer than the work
  MOST_ASKED = 512 << 10,    // bytes a worker asks for ahead of time: half of a second-level cache
};

struct plan {
  struct task *tasks;
  size_t count, workers;
};

// How far a worker has asked for the memory of a task to come.
struct asked {
  size_t task, unit, done, bytes;
};

static void pause_briefly(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Half of the units belong to workers, so that a worker knows where it will start; the other half goes to whoever
// comes, in runs that are long at first, for streaming, and single units at the end, so that all finish together.
static size_t own_units(const struct plan *plan, size_t units) { return units / (2 * plan->workers); }

static size_t take(const struct plan *plan, struct progress *p, size_t units, size_t worker, size_t *begin) {
  size_t own = own_units(plan, units), shared = units - own * plan->workers;
  if (own && !(atomic_fetch_or(&p->owned, (uint64_t)1 << worker) >> worker & 1)) {
    *begin = worker * own;
    return own;
  }
  size_t at = atomic_load_explicit(&p->taken, memory_order_relaxed);
  while (at < shared) {
    size_t share = (shared - at) / (2 * plan->workers), run = share ? share : 1;
    if (atomic_compare_exchange_weak(&p->taken, &at, at + run)) {
      *begin = own * plan->workers + at;
      return run;
    }
  }
  // What belongs to workers that have not come: the runtime may have given us one thread only.
  for (size_t other = 0; own && other < plan->workers; other++)
    if (!(atomic_fetch_or(&p->owned, (uint64_t)1 << other) >> other & 1)) {
      *begin = other * own;
      return own;
    }
  return 0;
}

static size_t next_to_ask(const struct plan *plan, size_t task) {
  while (++task < plan->count && !plan->tasks[task].ask) continue;
  return task;
}

// A little of what this worker reads next; zero where it has asked for enough, or what comes is not known yet.
static size_t ask(const struct plan *plan, size_t now, size_t worker, struct asked *a) {
  if (a->task <= now) *a = (struct asked){.task = next_to_ask(plan, now)};
  while (a->task < plan->count && a->bytes < MOST_ASKED) {
    const struct task *task = &plan->tasks[a->task];
    size_t units = __atomic_load_n(task->units, __ATOMIC_ACQUIRE), own = own_units(plan, units);
    if (!units) return 0;
    while (a->unit < own) {
      size_t bytes = task->ask(task->argument, own * worker + a->unit, a->done);
      a->bytes += bytes;
      a->done += bytes;
      if (bytes) return bytes;
      a->unit++;
      a->done = 0;
    }
    a->task = next_to_ask(plan, a->task);
    a->unit = a->done = 0;
  }
  return 0;
}

static void work(void *argument, size_t worker) {
  struct plan *plan = argument;
  struct asked asked = {0};
  for (size_t i = 0; i < plan->count; i++) {
    struct task *task = &plan->tasks[i];
    struct progress *p = &task->progress;
    size_t begin, run, units = *task->units;
    while ((run = take(plan, p, units, worker, &begin))) {
      task->run(task->argument, begin, begin + run);
      atomic_fetch_add(&p->done, run);
    }
    // Whatever is not done was taken by a worker that is running, so this ends.
    for (unsigned spins = 0; i + 1 < plan->count && atomic_load(&p->done) < units;)
      if (!ask(plan, i, worker, &asked)) {
        if (spins++ < 4096)
          pause_briefly();
        else
          sched_yield();
      }
  }
}

// Asking the system opens files, which takes as long as reading 200 KB: once is enough.
static size_t processors(void) {
  static _Atomic size_t known;
  size_t count = atomic_load_explicit(&known, memory_order_relaxed);
  if (!count) {
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    count = online < 1 ? 1 : (size_t)online;
    atomic_store_explicit(&known, count, memory_order_relaxed);
  }
  return count;
}

ort_status *do_tasks(const ort_api *api, const ort_kernel_context *context, struct task *tasks, size_t count,
                     size_t bytes) {
  size_t workers = processors();
  if (workers > bytes / WORTH_A_THREAD + 1) workers = bytes / WORTH_A_THREAD + 1;
  if (workers > MOST_WORKERS) workers = MOST_WORKERS;
  struct plan plan = {tasks, count, workers};
  if (workers == 1) {
    work(&plan, 0);
    return NULL;
  }
  return ort_parallel_for(api)(context, work, workers, workers, &plan);
}

ort_status *do_phases(const ort_api *api, const ort_kernel_context *context, const struct phase *phases,
                      size_t count, size_t bytes, void *argument) {
  struct task tasks[MOST_PHASES];
  for (size_t i = 0; i < count; i++) tasks[i] = (struct task){phases[i].run, argument, &phases[i].units, NULL, {0}};
  return do_tasks(api, context, tasks, count, bytes);
}
