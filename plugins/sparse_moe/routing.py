"""From router scores to expert ids and mixing weights: one kernel, one program a token."""

import triton
import triton.language as tl

LEAST_KEY = tl.constexpr(-(1 << 63))
GREATEST_KEY = tl.constexpr((1 << 63) - 1)


@triton.jit
def _choose(
    selection,
    weights,
    ids,
    mix,
    token,
    first,
    EXPERTS: tl.constexpr,
    HERE: tl.constexpr,
    LANES: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Write one token's slots: the `TOP_K` highest of `selection` in ascending order of their ids.

    Keys are the values' bits made to order as integers, above the place counted from the end: they are all
    different, so equals go to the lowest id, and whatever the values (NaN ranks highest) exactly `TOP_K`
    valid ids are written. Where only `HERE` experts from `first` on are held, ids count from there, and those
    of others are -1.
    """
    expert = tl.arange(0, LANES)
    bits = tl.where(selection == 0, 0.0, selection).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    key = tl.where(expert < EXPERTS, (ordered << 32) | (LANES - expert).to(tl.int64), LEAST_KEY)
    bound = tl.max(key, 0)
    for _ in range(TOP_K - 1):
        bound = tl.max(tl.where(key < bound, key, LEAST_KEY), 0)
    chosen = key >= bound
    slot = token * SLOTS + tl.cumsum(chosen.to(tl.int32), 0) - 1
    total = tl.sum(tl.where(chosen, weights, 0.0), 0) + 1e-20
    if HERE < EXPERTS:
        held = (expert >= first) & (expert < first + HERE)
        expert = tl.where(held, expert - first, -1)
    tl.store(ids + slot, expert, mask=chosen)
    tl.store(mix + slot, weights / total * SCALE, mask=chosen)
    if SLOTS > TOP_K:
        tl.store(ids + token * SLOTS + TOP_K, EXPERTS)
        tl.store(mix + token * SLOTS + TOP_K, 1.0)


@triton.jit
def route_logits(
    logits,
    bias,
    ids,
    mix,
    first,
    EXPERTS: tl.constexpr,
    HERE: tl.constexpr,
    LANES: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Specification 2.8 from the router's product on; the grid is `[tokens]`.

    `logits [t, EXPERTS]` and `bias [EXPERTS]` fp32 to `ids [t, SLOTS]` int32 and `mix [t, SLOTS]` fp32. A
    slot beyond `TOP_K` is the shared expert: id `EXPERTS`, weight 1. `LANES` is `EXPERTS` raised to a power
    of two.
    """
    token = tl.program_id(0)
    expert = tl.arange(0, LANES)
    present = expert < EXPERTS
    logit = tl.load(logits + token.to(tl.int64) * EXPERTS + expert, mask=present, other=0.0)
    score = 1.0 / (1.0 + tl.exp(-logit))
    selection = score + tl.load(bias + expert, mask=present, other=0.0)
    _choose(selection, score, ids, mix, token, first, EXPERTS, HERE, LANES, TOP_K, SLOTS, SCALE)


@triton.jit
def route_selection(
    selection,
    weights,
    ids,
    mix,
    first,
    EXPERTS: tl.constexpr,
    HERE: tl.constexpr,
    LANES: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    SCALE: tl.constexpr,
):
    """As `route_logits` from `selection` and `weights` `[t, EXPERTS]` fp32, as the vocabulary has them."""
    token = tl.program_id(0)
    expert = tl.arange(0, LANES)
    place = token.to(tl.int64) * EXPERTS + expert
    present = expert < EXPERTS
    chosen_by = tl.load(selection + place, mask=present, other=0.0)
    weight = tl.load(weights + place, mask=present, other=0.0)
    _choose(chosen_by, weight, ids, mix, token, first, EXPERTS, HERE, LANES, TOP_K, SLOTS, SCALE)
