#include "routing.h"

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

// Places of what lies in the room, and its size at the end.
enum { USED, NEXT, FACTOR, TOKEN, WEIGHT, MORE, CHOSEN, END };

static void places_of(size_t tokens, size_t experts, size_t top_k, size_t places[END + 1]) {
  size_t pairs = tokens * top_k;
  size_t sizes[END] = {experts * sizeof(struct used), (experts + 1) * sizeof(size_t), tokens * sizeof(float),
                       pairs * sizeof(int32_t),       pairs * sizeof(float),         pairs,
                       tokens * experts};
  places[0] = 0;
  for (size_t i = 0; i < END; i++) places[i + 1] = places[i] + sizes[i];
}

size_t routing_size(size_t tokens, size_t experts, size_t top_k) {
  size_t places[END + 1];
  places_of(tokens, experts, top_k, places);
  return places[END];
}

void routing_in(void *room, size_t tokens, size_t experts, size_t top_k, struct routing *out) {
  size_t places[END + 1];
  char *at = room;
  places_of(tokens, experts, top_k, places);
  *out = (struct routing){.used = (struct used *)at,
                          .next = (size_t *)(at + places[NEXT]),
                          .factor = (float *)(at + places[FACTOR]),
                          .token = (int32_t *)(at + places[TOKEN]),
                          .weight = (float *)(at + places[WEIGHT]),
                          .more = (uint8_t *)(at + places[MORE]),
                          .chosen = (uint8_t *)(at + places[CHOSEN])};
}

void route(const float *selection, const float *weights, size_t tokens, size_t experts, size_t top_k, float scale,
           struct routing *out) {
  size_t *next = out->next;
  float *factor = out->factor;
  uint8_t *chosen = out->chosen;
  memset(next, 0, (experts + 1) * sizeof *next);
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
}
