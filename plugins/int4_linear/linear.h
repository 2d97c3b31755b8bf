// Products of one input: quantised by block of each row once, then multiplied with each weight.
#ifndef STEP35_LINEAR_H
#define STEP35_LINEAR_H

#include "../cpu/int4.h"

enum { PRODUCTS = 4 };

// A product with 4-bit weights, or, where `dense` is there, with fp32 ones, [width, columns].
struct product {
  struct int4_matrix w;
  const float *dense;
  float *y;
  size_t width, units;
};

struct linear {
  const struct int4_routines *routines;
  struct int8_rows rows;
  const float *x, *up; // up: null where x is the input itself
  size_t columns;
  float limit;
  size_t count, quantise_units, multiply_units, bytes;
  struct product products[PRODUCTS];
};

// Counts units and bytes once the products, rows and columns are known.
void linear_plan(struct linear *l);

// Unit: a slice of a row.
void linear_quantise(void *linear, size_t begin, size_t end);

// Unit: a few tiles or rows, numbered through all products.
void linear_multiply(void *linear, size_t begin, size_t end);

// Asks for what a unit of linear_multiply reads; see cpu/work.h.
size_t linear_ask(void *linear, size_t unit, size_t done);

#endif
