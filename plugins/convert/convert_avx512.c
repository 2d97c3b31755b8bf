#ifdef __x86_64__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#define ROUTINES convert_avx512
#define ROUTINES_NAME "avx512"
#include "convert_body.h"
#pragma clang attribute pop
#endif
