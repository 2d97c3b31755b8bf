// AVX-512.
#ifdef __x86_64__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)

#define ROUTINES attend_avx512
#define SCORE_ROWS 4
#define SCORE_TILES 4
#define MIX_ROWS 4
#define MIX_VECTORS 4
#include "attend_body.h"

#pragma clang attribute pop
#endif
