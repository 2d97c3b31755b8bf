// What is done to each row by itself, between products.
#ifndef STEP35_ROWS_H
#define STEP35_ROWS_H

#include "../cpu/int4.h"

enum row_kind { EMBED_ROW, TAKE_ROW, ADD_ROW, NORM_ROW, QUANTISE_ROW };

struct row_step {
  enum row_kind kind;
  const float *a, *b;   // b: what is added, the gamma of a norm or the scales of an embedding
  const uint8_t *codes; // of an embedding
  const int64_t *index; // which rows of the codes, or of a, are taken
  float *to;
  struct int8_rows rows; // where quantised rows go
  size_t width, block;
  float eps;
};

enum { MOST_ROW_STEPS = 8 };

// Steps done to each of the rows.
struct row_group {
  const struct int4_routines *routines;
  size_t rows, steps;
  struct row_step step[MOST_ROW_STEPS];
};

// Unit: a row.
void do_rows(void *row_group, size_t begin, size_t end);

#endif
