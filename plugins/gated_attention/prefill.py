"""Attention of many new tokens of a sequence: flash attention over the pages, gated in its epilogue."""

import triton
import triton.language as tl

from .attend import attend, gated
from .tiles import first_tile


@triton.jit
def prefill(
    queries,
    keys,
    values,
    gate,
    blocks,
    starts,
    pasts,
    table,
    key_scale,
    value_scale,
    out,
    table_pages,
    KV_HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    PAGE: tl.constexpr,
    SCALE: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program takes `TOKENS` tokens and `HEADS` query heads; the grid is `[H / HEADS, blocks]`.

    `blocks [blocks, 2]` names each block's sequence and its first token in it. Heads that share keys share a
    tile: it spans fewer tokens, so less of it falls outside the window or the causal triangle.
    """
    first_head = tl.program_id(0) * HEADS
    group = first_head // SHARE
    sequence = tl.load(blocks + tl.program_id(1) * 2)
    first = tl.load(blocks + tl.program_id(1) * 2 + 1)
    start = tl.load(starts + sequence)
    count = tl.load(starts + sequence + 1) - start
    past = tl.load(pasts + sequence)

    row = tl.arange(0, TOKENS * HEADS)
    token = first + row // HEADS
    present = token < count
    position = past + token
    column = tl.arange(0, D)
    line = (start + token).to(tl.int64) * (KV_HEADS * SHARE) + first_head + row % HEADS
    query = tl.load(queries + line[:, None] * D + column[None, :], present[:, None], other=0.0)
    scale = SCALE * tl.load(key_scale + group)
    table += sequence * table_pages

    highest = tl.full([TOKENS * HEADS], float("-inf"), tl.float32)
    weight = tl.zeros([TOKENS * HEADS], tl.float32)
    mixed = tl.zeros([TOKENS * HEADS, D], tl.float32)
    lowest = past + first
    begin = first_tile(lowest, WINDOW, BLOCK_N)
    end = past + tl.minimum(first + TOKENS, count)
    if WINDOW == 0:
        whole = (lowest + 1) // BLOCK_N * BLOCK_N  # every row sees the keys before
        highest, weight, mixed = attend(
            query, highest, weight, mixed, keys, values, table, table_pages, group, position, lowest,
            begin, whole, scale, False, KV_HEADS, D, WINDOW, PAGE, BLOCK_N,
        )  # fmt: skip
        begin = whole
    highest, weight, mixed = attend(
        query, highest, weight, mixed, keys, values, table, table_pages, group, position, lowest,
        begin, end, scale, True, KV_HEADS, D, WINDOW, PAGE, BLOCK_N,
    )  # fmt: skip

    logit = tl.load(gate + line, present, other=0.0)
    result = gated(mixed * (tl.load(value_scale + group) / weight)[:, None], logit[:, None])
    tl.store(out + line[:, None] * D + column[None, :], result.to(out.dtype.element_ty), present[:, None])
