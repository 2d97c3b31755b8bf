"""What decoding and prefill share: the loop over keys and the gate."""

import triton
import triton.language as tl

from .tiles import tile_offset

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend(
    query,
    highest,
    weight,
    mixed,
    keys,
    values,
    table,
    table_pages,
    group,
    position,
    lowest,
    begin,
    end,
    scale,
    EDGE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add the keys `begin <= j < end`; without `EDGE` every row sees all of them and they are whole tiles.

    `lowest` is the position of the first row.
    """
    entry = tl.arange(0, BLOCK_N)
    column = tl.arange(0, D)
    inside = entry[:, None] * D + column[None, :]
    for tile in range(begin, end, BLOCK_N):
        rows_at = tile_offset(table, table_pages, group, tile, KV_HEADS, PAGE, D)
        if EDGE:
            key_position = tile + entry
            # Rows that no query may see may never have been written: NaN there would pass a weight of 0.
            written = key_position < end
            if WINDOW > 0:
                written &= key_position > lowest - WINDOW
            key = tl.load(keys + rows_at + inside, written[:, None], other=0.0)
            value = tl.load(values + rows_at + inside, written[:, None], other=0.0)
        else:
            key = tl.load(keys + rows_at + inside)
            value = tl.load(values + rows_at + inside)
        scores = tl.dot(query, tl.trans(key.to(query.dtype))) * scale
        if EDGE:
            seen = key_position[None, :] <= position[:, None]
            if WINDOW > 0:
                seen &= key_position[None, :] > position[:, None] - WINDOW
            scores = tl.where(seen, scores, float("-inf"))
        # Scores are logarithms to base 2.
        new = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen no key yet
        attention = tl.exp2(scores - base[:, None])
        decay = tl.exp2(highest - base)
        highest = new
        weight = weight * decay + tl.sum(attention, 1)
        mixed = tl.dot(attention.to(query.dtype), value.to(query.dtype), mixed * decay[:, None])
    return highest, weight, mixed


@triton.jit
def gated(x, logit):
    """`x * sigmoid(logit)` in fp32; where the exponential overflows, 1 / inf is the 0 that is meant."""
    return x / (1.0 + tl.exp2(logit.to(tl.float32) * -LOG2_E))
