// What step35_trt/quantize/native.py calls.
#include "../cpu/isa.h"
#include "convert.h"

#define EXPORT __attribute__((visibility("default")))

static const struct convert_routines *routines(void) {
  switch (isa_choose()) {
#ifdef __x86_64__
    case ISA_AVX512: return &convert_avx512;
    case ISA_AVX2: return &convert_avx2;
#endif
    default: return &convert_portable;
  }
}

EXPORT const char *convert_isa(void) { return routines()->name; }

EXPORT int convert_integers(const struct convert_source *w, int bits, size_t group, const float *ratios,
                            int layout, int offset, uint8_t *codes, uint16_t *scales) {
  return routines()->integers(w, bits, group, ratios, layout, offset, codes, scales);
}

EXPORT int convert_fp8(const struct convert_source *w, size_t block_rows, size_t block_columns, uint8_t *codes,
                       float *scales) {
  return routines()->fp8(w, block_rows, block_columns, codes, scales);
}

EXPORT int convert_finite(const struct convert_source *w) { return routines()->finite(w); }
