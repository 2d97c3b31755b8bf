// AVX2 with FMA.
#ifdef __x86_64__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)

#define ROUTINES attend_avx2
#define SCORE_ROWS 4
#define SCORE_TILES 1
#define MIX_ROWS 4
#define MIX_VECTORS 1
#include "attend_body.h"

#pragma clang attribute pop
#endif
