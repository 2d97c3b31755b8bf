#include "isa.h"

#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>

// Bits of cpuid leaf 1 ecx, leaf 7 ebx and leaf 7 ecx, and of the register state the system saves.
enum {
  FMA = 1 << 12, OSXSAVE = 1 << 27, AVX = 1 << 28, F16C = 1 << 29,
  AVX2 = 1 << 5, AVX512F = 1 << 16, AVX512DQ = 1 << 17, AVX512BW = 1 << 30,
  AVX512VNNI = 1 << 11,
  YMM_STATE = 0x6, ZMM_STATE = 0xe6,
};
static const unsigned AVX512VL = 1u << 31;

static int has(unsigned ecx_1, unsigned ebx_7, unsigned ecx_7, unsigned state) {
  unsigned a, b, c, d, saved, high;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & (ecx_1 | OSXSAVE)) != (ecx_1 | OSXSAVE)) return 0;
  __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  if ((saved & state) != state) return 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & ebx_7) == ebx_7 && (c & ecx_7) == ecx_7;
}

static int has_avx2(void) { return has(FMA | AVX | F16C, AVX2, 0, YMM_STATE); }

static int has_avx512(void) {
  return has(FMA | AVX | F16C, AVX2 | AVX512F | AVX512DQ | AVX512BW | AVX512VL, AVX512VNNI, ZMM_STATE);
}
#elif defined(__aarch64__)
#include <sys/auxv.h>
#define ASIMDDP (1ul << 20) // the kernel's bit for the 8-bit dot product
static int has_dot(void) { return (getauxval(AT_HWCAP) & ASIMDDP) != 0; }
#endif

static int always(void) { return 1; }

enum isa isa_choose(void) {
  static const struct {
    enum isa isa;
    const char *name;
    int (*here)(void);
  } known[] = {
#if defined(__x86_64__)
      {ISA_AVX512, "avx512", has_avx512},
      {ISA_AVX2, "avx2", has_avx2},
#elif defined(__aarch64__)
      {ISA_NEON, "neon", has_dot},
#endif
      {ISA_PORTABLE, "portable", always},
  };
  const char *asked = getenv("STEP35_CPU_ISA");
  for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
    if (asked && *asked && strcmp(asked, known[i].name)) continue;
    if (known[i].here()) return known[i].isa;
  }
  return ISA_NONE;
}
