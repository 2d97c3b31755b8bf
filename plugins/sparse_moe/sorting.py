"""Tokens sorted by expert on the device: a stable counting sort without atomics, so the order is one."""

import triton
import triton.language as tl


@triton.jit
def count_pairs(ids, counts, pairs, BLOCK: tl.constexpr):
    """`counts[e]` of the `pairs` entries of `ids` are expert e; the grid is `[experts]`."""
    expert = tl.program_id(0)
    hits = tl.zeros([BLOCK], tl.int32)
    for start in range(0, pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        hits += (tl.load(ids + pair, mask=pair < pairs, other=-1) == expert).to(tl.int32)
    tl.store(counts + expert, tl.sum(hits, 0))


@triton.jit
def place_pairs(
    ids,
    counts,
    order,
    tiles,
    pairs,
    most_tiles,
    ALL: tl.constexpr,
    LANES: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write each expert's part of the order and its tiles; the grid is `[ALL]`.

    `order [pairs]` are the pairs by expert, then by token. `tiles` `[1 + 3 * most_tiles]` int32: how many
    tiles of at most `TOKENS` pairs there are, then of each its expert, its first place in `order` and the
    place after its last. `LANES` is `ALL`, the number of experts with the shared one, raised to a power of
    two.
    """
    expert = tl.program_id(0)
    lane = tl.arange(0, LANES)
    count = tl.load(counts + lane, mask=lane < ALL, other=0)
    needed = (count + TOKENS - 1) // TOKENS
    first = tl.sum(tl.where(lane < expert, count, 0), 0)
    mine = tl.sum(tl.where(lane == expert, count, 0), 0)
    tile = tl.sum(tl.where(lane < expert, needed, 0), 0)
    if expert == 0:
        tl.store(tiles, tl.sum(needed, 0))
    for start in range(0, mine, TOKENS):
        entry = tiles + 1 + tile + start // TOKENS
        tl.store(entry, expert)
        tl.store(entry + most_tiles, first + start)
        tl.store(entry + 2 * most_tiles, first + tl.minimum(start + TOKENS, mine))
    for start in range(0, pairs, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        hit = (tl.load(ids + pair, mask=pair < pairs, other=-1) == expert).to(tl.int32)
        tl.store(order + first + tl.cumsum(hit, 0) - 1, pair, mask=hit == 1)
        first += tl.sum(hit, 0)
