// Which expert does which token, grouped by expert.
#ifndef STEP35_ROUTING_H
#define STEP35_ROUTING_H

#include <stddef.h>
#include <stdint.h>

struct used {
  int32_t expert;
  size_t first, count; // its pairs
};

// Pairs of an expert and a token, by expert and then by token.
struct routing {
  struct used *used; // ascending
  size_t used_count;
  int32_t *token; // of each pair
  float *weight;
  uint8_t *more; // whether a lower expert has the token too
  // While routing: an expert's next pair, a token's divisor, and who has been chosen.
  size_t *next;
  float *factor;
  uint8_t *chosen;
};

// Memory for routing, aligned for pointers, and where in it things lie. `top_k` is at most `experts`.
size_t routing_size(size_t tokens, size_t experts, size_t top_k);
void routing_in(void *room, size_t tokens, size_t experts, size_t top_k, struct routing *out);

void route(const float *selection, const float *weights, size_t tokens, size_t experts, size_t top_k, float scale,
           struct routing *out);

#endif
