// Quantising rows of weights as step35_trt/quantize/blocks.py defines it, to the bit.
#ifndef STEP35_CONVERT_H
#define STEP35_CONVERT_H

#include <stddef.h>
#include <stdint.h>

// A matrix of `rows` x `columns`, contiguous; bf16 or fp32.
struct convert_source {
  const void *values;
  size_t rows, columns;
  int bf16;
};

enum { CONVERT_OK = 0, CONVERT_NOT_FINITE = 1, CONVERT_SCALE_OVERFLOW = 2 };

// How integer codes lie: a byte each, or two of four bits in a byte: neighbours of a row, or of a column.
enum { BYTES = 0, ROW_PAIRS = 1, COLUMN_PAIRS = 2 };

struct convert_routines {
  const char *name;
  // Groups of `group` values (a multiple of 16) along the columns; `ratios`, where given, has a factor for each
  // group's largest value. Codes carry `offset`. With COLUMN_PAIRS an odd last row is paired with zeros.
  int (*integers)(const struct convert_source *w, int bits, size_t group, const float *ratios, int layout,
                  int offset, uint8_t *codes, uint16_t *scales);
  // Blocks of block_rows x block_columns share a scale; the last ones of a row or column may be cut.
  int (*fp8)(const struct convert_source *w, size_t block_rows, size_t block_columns, uint8_t *codes,
             float *scales);
  int (*finite)(const struct convert_source *w);
};

extern const struct convert_routines convert_portable;
#ifdef __x86_64__
extern const struct convert_routines convert_avx2, convert_avx512;
#endif

#endif
