#include "../gated_attention/plan.h"
#include "../int4_linear/linear.h"
#include "../sparse_moe/experts.h"
#include "call.h"
#include "rows.h"

// As in onnx_chain_steps.py.
enum { EMBED, ROWS, ADD, NORM, ATTEND, LINEAR, GATED, EXPERTS, DROP };

static const struct int4_routines *routines(const struct call *c) { return int4_routines[c->self->isa]; }

// `t` says which rows of `of` are meant.
static void check_index(struct call *c, const struct tensor *t, const struct tensor *of) {
  const int64_t *index = t->data;
  if (!c->status && t->rank != 1) fail(c, "an index is not one of rows");
  for (int64_t i = 0; !c->status && i < t->dims[0]; i++)
    if (index[i] < 0 || index[i] >= of->dims[0]) fail(c, "an id or an index is out of range");
}

static void task(struct call *c, struct task task) {
  if (c->tasks == c->self->tasks) fail(c, "it has too many tasks");
  if (c->status) return;
  c->task[c->tasks++] = task;
  c->group = NULL;
  reuse_dropped(c);
}

// Row steps that follow each other are one task; not so rows that are taken, which reads rows that others make.
static void row_step(struct call *c, size_t rows, struct row_step step) {
  struct row_group *group = c->group;
  if (!group || group->rows != rows || group->steps == MOST_ROW_STEPS || step.kind == TAKE_ROW) {
    group = piece(c, sizeof *group);
    if (!group) return;
    group->routines = routines(c);
    group->rows = rows;
    group->steps = 0;
    task(c, (struct task){do_rows, group, &group->rows, NULL, {0}});
    c->group = group;
  }
  if (!c->status) group->step[group->steps++] = step;
}

static void take_rows(struct call *c, int embeds) {
  struct row_step step = {.kind = embeds ? EMBED_ROW : TAKE_ROW};
  const struct tensor *ids = value(c), *from = value(c), *scales = embeds ? value(c) : NULL;
  int64_t block = embeds ? integer(c) : TILE;
  if (!c->status && (from->rank != 2 || block < 1 || from->dims[1] % block)) fail(c, "rows of what is no matrix");
  if (!c->status && embeds && (scales->rank != 2 || scales->dims[0] != from->dims[0] ||
                               scales->dims[1] * block != from->dims[1]))
    fail(c, "the embedding's scales do not fit its codes");
  check_index(c, ids, from);
  if (c->status) return;
  step.index = ids->data;
  step.a = !embeds ? from->data : NULL;
  step.codes = from->data;
  step.b = embeds ? scales->data : NULL;
  step.block = (size_t)block;
  step.width = (size_t)from->dims[1];
  step.to = made(c, ids->dims[0], from->dims[1]);
  row_step(c, (size_t)ids->dims[0], step);
}

static void add(struct call *c) {
  const struct tensor *a = activation(c, NULL, 0), *b = activation(c, a, 1);
  struct row_step step = {.kind = ADD_ROW, .a = a->data, .b = b->data, .width = (size_t)a->dims[1]};
  step.to = made(c, a->dims[0], a->dims[1]);
  row_step(c, (size_t)a->dims[0], step);
}

static void norm(struct call *c) {
  const struct tensor *x = activation(c, NULL, 0);
  struct row_step step = {.kind = NORM_ROW, .a = x->data, .width = (size_t)x->dims[1]};
  step.b = vector(c, step.width);
  step.eps = number(c);
  step.to = made(c, x->dims[0], x->dims[1]);
  row_step(c, (size_t)x->dims[0], step);
}

// Weight, scales and width of a product.
static void product(struct call *c, struct linear *l) {
  const struct tensor *weight = value(c);
  int fp32 = c->at < c->end && *c->at < 0;
  const struct tensor *scales = fp32 ? (integer(c), weight) : value(c);
  int64_t width = integer(c);
  if (c->status) return;
  struct product *p = &l->products[l->count++];
  if (!fp32)
    c->status = matrix_of(c->api, "Chain", weight, scales, 0, width, (int64_t)l->columns, (int64_t)l->rows.block,
                          &p->w);
  else if (weight->rank != 2 || weight->dims[0] != width || weight->dims[1] != (int64_t)l->columns)
    fail(c, "an fp32 weight does not fit its input");
  p->dense = fp32 ? weight->data : NULL;
  p->width = (size_t)width;
  p->y = made(c, (int64_t)l->rows.count, width);
}

static size_t block_size(struct call *c, size_t columns) {
  int64_t block = integer(c);
  if (!c->status && (block < 16 || block > MOST_BLOCK || block % 16 || columns % (size_t)block))
    fail(c, "a block is not 16, 32, ... or 128, or does not divide its columns");
  return (size_t)block;
}

static void linear(struct call *c, int gated) {
  const struct tensor *x = activation(c, NULL, 0);
  struct linear *l = piece(c, sizeof *l);
  if (!l) return;
  *l = (struct linear){.routines = routines(c), .x = x->data, .columns = (size_t)x->dims[1]};
  l->rows.count = (size_t)x->dims[0];
  if (gated) l->up = activation(c, x, 1)->data;
  l->rows.block = block_size(c, l->columns);
  int64_t count = gated ? 1 : integer(c);
  if (count < 1 || count > PRODUCTS) fail(c, "a step has no or too many products");
  for (int64_t i = 0; i < count && !c->status; i++) product(c, l);
  if (gated) l->limit = limit_of(c);
  if (c->status) return;
  void *rows = room(c, rows_size(l->rows.count, l->columns, l->rows.block));
  if (!rows) return;
  rows_in(rows, l->rows.count, l->columns, l->rows.block, &l->rows);
  linear_plan(l);
  c->bytes += l->bytes;
  if (!gated && c->group)
    row_step(c, l->rows.count,
             (struct row_step){.kind = QUANTISE_ROW, .a = l->x, .rows = l->rows, .width = l->columns});
  else
    task(c, (struct task){linear_quantise, l, &l->quantise_units, NULL, {0}});
  task(c, (struct task){linear_multiply, l, &l->multiply_units, linear_ask, {0}});
  drop(c, rows);
}

static void experts(struct call *c) {
  const struct tensor *x = activation(c, NULL, 0), *logits = activation(c, x, 0);
  struct experts *e = piece(c, sizeof *e);
  if (!e) return;
  *e = (struct experts){.routines = routines(c), .x = x->data, .logits = logits->data,
                        .tokens = (size_t)x->dims[0], .experts = (size_t)logits->dims[1], .d = (size_t)x->dims[1]};
  e->bias = vector(c, e->experts);
  const struct tensor *part[4];
  for (size_t i = 0; i < 4; i++) part[i] = value(c);
  size_t block = block_size(c, e->d);
  int64_t top_k = integer(c);
  e->scale = number(c);
  e->limit = limit_of(c);
  if (!c->status && (top_k < 1 || top_k > logits->dims[1] || part[2]->rank != 4))
    fail(c, "the experts do not fit together");
  if (c->status) return;
  int64_t count = logits->dims[1], inner = part[2]->dims[2] * 8;
  e->top_k = (size_t)top_k;
  e->inner = (size_t)inner;
  c->status = matrix_of(c->api, "Chain", part[0], part[1], count, 2 * inner, x->dims[1], (int64_t)block, &e->gate_up);
  if (!c->status)
    c->status = matrix_of(c->api, "Chain", part[2], part[3], count, x->dims[1], inner, (int64_t)block, &e->down);
  e->y = made(c, x->dims[0], x->dims[1]);
  void *memory = c->status ? NULL : room(c, experts_size(e));
  struct task tasks[EXPERTS_TASKS];
  if (!memory) return;
  experts_plan(e, memory, tasks);
  c->bytes += e->bytes;
  for (size_t i = 0; i < EXPERTS_TASKS; i++) task(c, tasks[i]);
  drop(c, memory);
}

static void attend(struct call *c) {
  const struct tensor *in[ATTENTION_INPUTS];
  for (size_t i = 0; i < ATTENTION_INPUTS; i++) in[i] = value(c);
  int64_t window = integer(c);
  float eps = number(c);
  struct attending *a = piece(c, sizeof *a);
  if (!a) return;
  a->routines = attend_routines[c->self->isa];
  c->status = attention_of(c->api, "Chain", in, window, eps, a);
  a->a.out = made(c, in[Q]->dims[0], in[Q]->dims[1]);
  a->a.keys = written(c, in[KEYS_IN]);
  a->a.values = written(c, in[VALUES_IN]);
  void *cuts = c->status ? NULL : piece(c, attention_cuts(a)), *memory = cuts ? room(c, attention_room(a)) : NULL;
  struct task tasks[ATTENTION_TASKS];
  if (!memory) return;
  attention_plan(a, cuts, memory, tasks);
  c->bytes += a->bytes;
  for (size_t i = 0; i < ATTENTION_TASKS; i++) task(c, tasks[i]);
  drop(c, memory);
}

void read_steps(struct call *c) {
  while (!c->status && c->at < c->end) {
    switch (integer(c)) {
      case EMBED: take_rows(c, 1); break;
      case ROWS: take_rows(c, 0); break;
      case ADD: add(c); break;
      case NORM: norm(c); break;
      case LINEAR: linear(c, 0); break;
      case GATED: linear(c, 1); break;
      case ATTEND: attend(c); break;
      case EXPERTS: experts(c); break;
      case DROP: drop(c, value(c)->data); break;
      default: fail(c, "it has a step of no known kind");
    }
  }
  }
