// No instruction set in particular; on 64-bit Arm that has vectors and multiply-adds already.
#define ROUTINES attend_portable
#define SCORE_ROWS 2
#define SCORE_TILES 1
#define MIX_ROWS 2
#define MIX_VECTORS 1
#include "attend_body.h"
