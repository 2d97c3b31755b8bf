// Whatever the compiler makes of 16 lanes on the target's least processor; on ARM that is NEON.
#define ROUTINES convert_portable
#define ROUTINES_NAME "portable"
#include "convert_body.h"
