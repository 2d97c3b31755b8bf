"""The splits of `decode` put together in a fixed order, normalised and gated."""

import triton
import triton.language as tl

from .attend import gated
from .tiles import first_tile, split_keys


@triton.jit
def reduce(
    partial,
    partial_state,
    gate,
    starts,
    pasts,
    out,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """A program takes one head of one token; the grid is `[H, tokens, sequences]`."""
    head = tl.program_id(0)
    token = tl.program_id(1)
    sequence = tl.program_id(2)
    start = tl.load(starts + sequence)
    count = tl.load(starts + sequence + 1) - start
    if (token >= count) | (count > QUERIES):
        return
    past = tl.load(pasts + sequence)
    span = past + count - first_tile(past, WINDOW, BLOCK_N)
    used = tl.cdiv(span, split_keys(span, BLOCK_N, SPLITS, LEAST))

    first = ((sequence * QUERIES + token).to(tl.int64) * HEADS + head) * SPLITS
    every = tl.arange(0, SPLITS)
    highest = tl.load(partial_state + (first + every) * 2, every < used, other=float("-inf"))
    weight = tl.load(partial_state + (first + every) * 2 + 1, every < used, other=0.0)
    top = tl.max(highest, 0)
    norm = tl.sum(tl.exp2(highest - top) * weight, 0)

    column = tl.arange(0, D)
    mixed = tl.zeros([D], tl.float32)
    for some in range(0, used, AT_ONCE):
        split = some + tl.arange(0, AT_ONCE)
        state = tl.load(partial_state + (first + split) * 2, split < used, other=float("-inf"))
        part = tl.load(
            partial + (first + split)[:, None] * D + column[None, :], (split < used)[:, None], other=0.0
        )
        mixed += tl.sum(part * tl.exp2(state - top)[:, None], 0)
    line = (start + token).to(tl.int64) * HEADS + head
    result = gated(mixed / norm, tl.load(gate + line))
    tl.store(out + line * D + column, result.to(out.dtype.element_ty))
