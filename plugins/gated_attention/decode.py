"""Attention of a few new tokens a sequence (decoding, verification of drafts), split over the keys."""

import triton
import triton.language as tl

from .attend import attend, gated
from .tiles import first_tile, split_keys


@triton.jit
def decode(
    queries,
    keys,
    values,
    gate,
    starts,
    pasts,
    table,
    key_scale,
    value_scale,
    out,
    partial,
    partial_state,
    table_pages,
    KV_HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    PAGE: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    LEAST_ROWS: tl.constexpr,
):
    """A program takes one split of one sequence's keys and one KV head; the grid is `[splits, G, sequences]`.

    Its rows are the query heads of that KV head, token after token: the keys are read once for all of them.
    With one split it writes `out [t, H*d]`; else, for `reduce`, fp32 sums in
    `partial [sequences, QUERIES, H, SPLITS, d]` and, in `partial_state [..., SPLITS, 2]`, the highest score
    and the sum of weights that belong to them.
    """
    split = tl.program_id(0)
    group = tl.program_id(1)
    sequence = tl.program_id(2)
    start = tl.load(starts + sequence)
    count = tl.load(starts + sequence + 1) - start
    past = tl.load(pasts + sequence)
    total = past + count
    origin = first_tile(past, WINDOW, BLOCK_N)
    size = split_keys(total - origin, BLOCK_N, SPLITS, LEAST)
    begin = origin + split * size
    end = tl.minimum(begin + size, total)
    if (count == 0) | (count > QUERIES) | (begin >= total):
        return

    tile_rows: tl.constexpr = ROWS if ROWS > LEAST_ROWS else LEAST_ROWS
    row = tl.arange(0, tile_rows)
    token = row // SHARE
    head = group * SHARE + row % SHARE
    present = token < count
    position = past + token
    column = tl.arange(0, D)
    line = (start + token).to(tl.int64) * (KV_HEADS * SHARE) + head
    query = tl.load(queries + line[:, None] * D + column[None, :], present[:, None], other=0.0)
    scale = SCALE * tl.load(key_scale + group)
    table += sequence * table_pages

    highest = tl.full([tile_rows], float("-inf"), tl.float32)
    weight = tl.zeros([tile_rows], tl.float32)
    mixed = tl.zeros([tile_rows, D], tl.float32)
    if WINDOW == 0:
        whole = tl.maximum(begin, tl.minimum(end, (past + 1) // BLOCK_N * BLOCK_N))  # all rows see these
        highest, weight, mixed = attend(
            query, highest, weight, mixed, keys, values, table, table_pages, group, position, past,
            begin, whole, scale, False, KV_HEADS, D, WINDOW, PAGE, BLOCK_N,
        )  # fmt: skip
        begin = whole
    highest, weight, mixed = attend(
        query, highest, weight, mixed, keys, values, table, table_pages, group, position, past,
        begin, end, scale, True, KV_HEADS, D, WINDOW, PAGE, BLOCK_N,
    )  # fmt: skip

    mixed = mixed * tl.load(value_scale + group)
    if SPLITS == 1:
        result = gated(mixed / weight[:, None], tl.load(gate + line, present, other=0.0)[:, None])
        tl.store(out + line[:, None] * D + column[None, :], result.to(out.dtype.element_ty), present[:, None])
    else:
        part = ((sequence * QUERIES + token).to(tl.int64) * (KV_HEADS * SHARE) + head) * SPLITS + split
        tl.store(partial + part[:, None] * D + column[None, :], mixed, present[:, None])
        tl.store(partial_state + part * 2, highest, present)
        tl.store(partial_state + part * 2 + 1, weight, present)
