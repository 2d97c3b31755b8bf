// Gated attention over a cache, in fp32: what the routines share with the operator.
//
// Keys lie in tiles of 16 positions, [G][capacity / 16][d][16], so that scores need no transposition; values
// lie as [G][capacity][d]. Position p is in row p modulo the capacity, a multiple of 16: a cache that is never
// full is the same as one that never wraps.
//
// A token's row is computed from its own keys in blocks that begin at fixed positions, so its bits depend
// neither on the call's other tokens nor on the instruction set. (In calls of more than SHORT tokens they may
// depend on that: keys are then not cut into chunks.)
#ifndef STEP35_ATTEND_H
#define STEP35_ATTEND_H

#include <stddef.h>

enum {
  MOST_DIM = 256,
  ROWS = 64,    // (token, head) pairs of one KV head done at once: they share the reading of its keys
  KEYS = 64,    // positions done at once
  CHUNK = 1024, // positions of a unit of work in a short call, a multiple of KEYS
  SHORT = 8,    // tokens
};

// H query heads, G KV heads, d elements of a head, of which 2 * half are rotated.
struct attention {
  const float *q, *k, *v, *gate; // [t, H d], [t, G d] twice, [t, H] logits
  const float *q_gamma, *k_gamma, *frequencies;
  float *keys, *values, *out;
  float *turns; // [t][2][half]: cosines and sines
  float *parts; // [chunks][t][H][d + 2]: a chunk's maximum, sum and weighted values; null where one chunk does
  size_t tokens, heads, groups, dim, half, capacity, window; // window 0: none
  size_t past, first_chunk, chunks;
  float eps;
};

struct attend_routines {
  // Writes a token's normed and rotated keys, and its values, into the cache.
  void (*write)(const struct attention *a, size_t token);

  // A unit of attend_units: some tokens' heads of one KV head, over one chunk.
  void (*attend)(const struct attention *a, size_t unit);

  // Puts a token's chunks together.
  void (*combine)(const struct attention *a, size_t token);
};

extern const struct attend_routines attend_portable, attend_avx2, attend_avx512;

static inline size_t tokens_at_once(const struct attention *a) {
  size_t at_once = ROWS * a->groups / a->heads;
  return at_once < 1 ? 1 : at_once;
}

static inline size_t token_blocks(const struct attention *a) {
  return (a->tokens + tokens_at_once(a) - 1) / tokens_at_once(a);
}

static inline size_t attend_units(const struct attention *a) { return a->chunks * a->groups * token_blocks(a); }

// The first position that a query sees.
static inline size_t seen_from(const struct attention *a, size_t position) {
  return a->window && position >= a->window ? position - a->window + 1 : 0;
}

#endif
