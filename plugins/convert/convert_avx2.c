#ifdef __x86_64__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#define ROUTINES convert_avx2
#define ROUTINES_NAME "avx2"
#include "convert_body.h"
#pragma clang attribute pop
#endif
