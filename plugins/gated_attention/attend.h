// Gated attention over paged caches, in fp32: what the routines share with the operator.
//
// Position p of a sequence lies in row p % page of its page p / page. Keys of a page lie in tiles of 16 positions,
// [G][page / 16][d][16], so that scores need no transposition; values lie as [G][page][d].
//
// A token's row is computed from its own keys in blocks and chunks that begin at fixed positions, so its bits
// depend neither on what else the call holds, nor on how its sequence was cut into calls, nor on the
// instruction set.
#ifndef STEP35_ATTEND_H
#define STEP35_ATTEND_H

#include <stddef.h>
#include <stdint.h>

enum {
  MOST_DIM = 256,
  UNIT_ROWS = 64, // (token, head) pairs of one KV head done at once: they share the reading of its keys
  KEYS = 64,      // positions done at once; pages are multiples of it, so no block lies in two
  CHUNK = 1024,   // positions summed by themselves, a multiple of KEYS; in a short call they are a unit of work
  SHORT = 8,      // tokens
};

// A sequence's part of a call: tokens begin .. begin + tokens - 1, at positions past, past + 1, ...
struct sequence {
  const int64_t *pages;
  size_t begin, tokens, past, first_chunk, chunks;
  float *parts; // [chunks][tokens][H][d + 2]: a chunk's maximum, sum and weighted values; null: chunks are no units
};

// `count` tokens' heads of one KV head, over one chunk or over all.
struct unit {
  uint32_t sequence, group, token, count, chunk;
};

// Where a token stands.
struct place {
  const struct sequence *sequence;
  size_t position;
};

// H query heads, G KV heads, d elements of a head, of which 2 * half are rotated.
struct attention {
  const float *q, *k, *v, *gate; // [t, H d], [t, G d] twice, [t, H] logits
  const float *q_gamma, *k_gamma, *frequencies;
  float *keys, *values, *out;
  float *turns; // [t][2][half]: cosines and sines
  const int64_t *starts, *pasts, *table; // of the sequences, as the operator takes them
  struct sequence *sequences;
  struct unit *units;
  struct place *places; // of each token
  size_t sequence_count, table_width, unit_count, parts; // parts: floats of the sequences' parts
  size_t tokens, heads, groups, dim, half, page, window; // window 0: none
  float eps;
};

struct attend_routines {
  // Writes a token's normed and rotated keys, and its values, into its page.
  void (*write)(const struct attention *a, size_t token);

  // Does units begin .. end - 1.
  void (*attend)(const struct attention *a, size_t begin, size_t end);

  // Puts a token's chunks together, where they were units.
  void (*combine)(const struct attention *a, size_t token);
};

extern const struct attend_routines attend_portable, attend_avx2, attend_avx512;

// The first position that a query sees.
static inline size_t seen_from(const struct attention *a, size_t position) {
  return a->window && position >= a->window ? position - a->window + 1 : 0;
}

// Where the rows of a KV head begin in the page of a position.
static inline size_t page_at(const struct attention *a, const struct sequence *s, size_t group, size_t position) {
  return ((size_t)s->pages[position / a->page] * a->groups + group) * a->page * a->dim;
}

// Positions that some row of a unit sees, and chunks that it sums.
struct reach {
  size_t from, to, chunk, chunks;
};

static inline struct reach reach_of(const struct attention *a, const struct unit *u) {
  const struct sequence *s = a->sequences + u->sequence;
  size_t first = s->past + u->token;
  struct reach r = {seen_from(a, first), first + u->count, s->first_chunk, s->chunks};
  if (!s->parts) return r;
  size_t begin = (s->first_chunk + u->chunk) * CHUNK;
  r.from = r.from > begin ? r.from : begin;
  r.to = r.to < begin + CHUNK ? r.to : begin + CHUNK;
  r.chunk += u->chunk;
  r.chunks = 1;
  return r;
}

#endif
