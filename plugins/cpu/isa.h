// Which instruction set the operators use: the best the processor and the operating system have.
#ifndef STEP35_ISA_H
#define STEP35_ISA_H

enum isa { ISA_NONE = -1, ISA_PORTABLE, ISA_AVX2, ISA_AVX512, ISA_NEON, ISA_COUNT };

// STEP35_CPU_ISA in the environment asks for another: ISA_NONE where the processor lacks it.
enum isa isa_choose(void);

#endif
