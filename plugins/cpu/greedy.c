// Greedy(logits [r, V] f32) -> tokens, choices [r] i64: each row's likeliest token, the lowest id among equals.
// Where a logit is not finite the choice is -1, and the token an id that an embedding has, so that what follows in
// the graph can go on until somebody looks at the choice.
#include <math.h>

#include "op.h"
#include "work.h"

struct state {
  const ort_api *api;
};

struct rows {
  const float *logits;
  size_t columns;
  int64_t *tokens, *choices;
};

enum { LANES = 16 };

// Largest of a row; the sum of 0 * x tells whether all are finite, as 0 * inf and 0 * nan are not 0.
static float largest(const float *x, size_t columns, int *finite) {
  float most[LANES], bad[LANES];
  size_t whole = columns / LANES * LANES;
  for (size_t i = 0; i < LANES; i++) most[i] = -INFINITY, bad[i] = 0;
  for (size_t at = 0; at < whole; at += LANES)
    for (size_t i = 0; i < LANES; i++) {
      most[i] = x[at + i] > most[i] ? x[at + i] : most[i];
      bad[i] += 0 * x[at + i];
    }
  for (size_t at = whole; at < columns; at++) {
    most[0] = x[at] > most[0] ? x[at] : most[0];
    bad[0] += 0 * x[at];
  }
  for (size_t i = 1; i < LANES; i++) {
    most[0] = most[i] > most[0] ? most[i] : most[0];
    bad[0] += bad[i];
  }
  *finite = bad[0] == 0;
  return most[0];
}

static void choose(void *argument, size_t begin, size_t end) {
  const struct rows *r = argument;
  for (size_t row = begin; row < end; row++) {
    const float *x = r->logits + row * r->columns;
    int finite;
    float most = largest(x, r->columns, &finite);
    size_t token = 0;
    while (finite && x[token] != most) token++;
    r->tokens[row] = (int64_t)token;
    r->choices[row] = finite ? (int64_t)token : -1;
  }
}

static ort_status *create(const ort_op *op, const ort_api *api, const ort_kernel_info *info, void **kernel) {
  (void)op, (void)info;
  struct state made = {api};
  return keep(api, &made, sizeof made, kernel);
}

static ort_status *compute(void *kernel, ort_kernel_context *context) {
  const ort_api *api = ((const struct state *)kernel)->api;
  struct tensor logits;
  float *out[2] = {NULL, NULL};
  ort_status *status = tensor_input(api, context, 0, &logits);
  if (!status && (logits.rank != 2 || logits.dims[1] < 1))
    status = failure(api, ORT_INVALID_ARGUMENT, "Greedy: the logits are not [r, V]");
  for (size_t i = 0; i < 2 && !status; i++) status = tensor_output(api, context, i, logits.dims, 1, &out[i]);
  if (status) return status;
  size_t rows = (size_t)logits.dims[0], columns = (size_t)logits.dims[1];
  struct rows r = {logits.data, columns, (int64_t *)out[0], (int64_t *)out[1]};
  struct phase phase = {choose, rows};
  return do_phases(api, context, &phase, 1, rows * columns * sizeof(float), &r);
}

static const char *name(const ort_op *op) { return (void)op, "Greedy"; }
static size_t outputs(const ort_op *op) { return (void)op, 2; }
static int float_input(const ort_op *op, size_t index) { return (void)op, (void)index, ORT_FLOAT; }
static int id_output(const ort_op *op, size_t index) { return (void)op, (void)index, ORT_INT64; }

const ort_op greedy_op = {
    .version = ORT_VERSION, .name = name, .provider = any_provider, .input_type = float_input,
    .input_count = one_output, .output_type = id_output, .output_count = outputs, .destroy = kernel_destroy,
    .input_kind = zero_of, .output_kind = zero_of, .input_memory = zero_of, .input_minimum = one_of,
    .input_alike = one_of, .output_minimum = one_of, .output_alike = one_of, .create_checked = create,
    .compute_checked = compute, .first_version = one_of, .last_version = newest,
};
