#include "routing.h"

#include <stdlib.h>
#include <string.h>

// Marks the `top_k` highest of a row, of equals the first; whatever the values, so many are marked.
static void choose(const float *selection, size_t experts, size_t top_k, uint8_t *chosen) {
  memset(chosen, 0, experts);
  for (size_t k = 0; k < top_k; k++) {
    size_t best = experts;
    for (size_t e = 0; e < experts; e++)
      if (!chosen[e] && (best == experts || selection[e] > selection[best])) best = e;
    chosen[best] = 1;
  }
}

void *route(const float *selection, const float *weights, size_t tokens, size_t experts, size_t top_k,
            float scale, struct routing *out) {
  size_t pairs = tokens * top_k;
  size_t sizes[] = {experts * sizeof(struct used), (experts + 1) * sizeof(size_t), tokens * sizeof(float),
                    pairs * sizeof(int32_t),       pairs * sizeof(float),         pairs,
                    tokens * experts};
  size_t total = 0, places[sizeof sizes / sizeof *sizes];
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
    places[i] = total;
    total += sizes[i];
  }
  char *room = malloc(total);
  if (!room) return NULL;
  size_t *next = (size_t *)(room + places[1]);
  float *factor = (float *)(room + places[2]);
  uint8_t *chosen = (uint8_t *)(room + places[6]);
  *out = (struct routing){(struct used *)room, 0, (int32_t *)(room + places[3]), (float *)(room + places[4]),
                          (uint8_t *)(room + places[5])};

  memset(next, 0, sizes[1]);
  for (size_t t = 0; t < tokens; t++) {
    float sum = 0;
    choose(selection + t * experts, experts, top_k, chosen + t * experts);
    for (size_t e = 0; e < experts; e++)
      if (chosen[t * experts + e]) {
        sum += weights[t * experts + e];
        next[e + 1]++;
      }
    factor[t] = sum + 1e-20f;
  }
  for (size_t e = 0; e < experts; e++) {
    if (next[e + 1]) out->used[out->used_count++] = (struct used){(int32_t)e, next[e], next[e + 1]};
    next[e + 1] += next[e];
  }
  for (size_t t = 0; t < tokens; t++) {
    uint8_t more = 0;
    for (size_t e = 0; e < experts; e++)
      if (chosen[t * experts + e]) {
        size_t pair = next[e]++;
        out->token[pair] = (int32_t)t;
        out->weight[pair] = weights[t * experts + e] / factor[t] * scale;
        out->more[pair] = more;
        more = 1;
      }
  }
  return room;
}
