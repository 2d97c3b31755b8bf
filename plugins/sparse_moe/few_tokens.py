"""From ids to output for a few tokens: two kernels, no sorting, no padding, no partial sums in memory.

Every program takes one token, so its bits depend on that token alone. The tokens of a step stand next to each
other in the launch order: where several chose an expert, its tile is fetched from memory once and then lies
in the L2 cache.
"""

import triton
import triton.language as tl

from .products import add_block, clipped_swiglu, finish, row_start, scale_start

# A tile of activations is one token and its copy: a tile of one column would be loaded without asynchronous
# copies, and the tensor cores' narrow side is eight columns wide anyway.
COLUMNS = tl.constexpr(2)


@triton.jit
def few_gate_up(
    x,
    ids,
    gate,
    gate_scales,
    up,
    up_scales,
    hidden,
    limit_bits,
    shared_limit_bits,
    D: tl.constexpr,
    INNER: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    DEALT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """`hidden [t * SLOTS, INNER]` bf16, the chosen experts' activations; the grid is `[t * SLOTS, tiles]`.

    `x [t, D]` bf16, `ids [t * SLOTS]` int32, matrices as in `pack.py`; limits are fp32 given by their bits.
    The features are dealt out block by block to `SPLITS` groups of warps, whose sums are added at the end.
    Where experts are `DEALT` out, pairs with id -1 are another device's and left as they are.
    """
    pair = tl.program_id(0)
    expert = tl.load(ids + pair).to(tl.int64)
    if DEALT and expert < 0:
        return
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[None, :, None]
    split = tl.arange(0, SPLITS)[:, None, None]
    present = row < INNER
    tokens = x + (pair // SLOTS).to(tl.int64) * D + tl.zeros([SPLITS, 1, COLUMNS], tl.int32)
    gate_rows = row_start(gate, expert, row, INNER, D, FORMAT)
    up_rows = row_start(up, expert, row, INNER, D, FORMAT)
    gate_scale = scale_start(gate_scales, expert, row, INNER, D, FORMAT)
    up_scale = scale_start(up_scales, expert, row, INNER, D, FORMAT)
    MASKED: tl.constexpr = INNER % ROWS != 0 or D % (BLOCK_K * SPLITS) != 0
    g = tl.zeros([SPLITS, ROWS, COLUMNS], tl.float32)
    u = tl.zeros([SPLITS, ROWS, COLUMNS], tl.float32)
    for step in tl.range(0, tl.cdiv(D, BLOCK_K * SPLITS), num_stages=STAGES):
        block = step * SPLITS + split
        g = add_block(
            g, gate_rows, gate_scale, tokens, block, present, INNER, D, FORMAT, BLOCK_K, MASKED, INTERPRETED
        )
        u = add_block(
            u, up_rows, up_scale, tokens, block, present, INNER, D, FORMAT, BLOCK_K, MASKED, INTERPRETED
        )
    g = first_column(finish(g, gate_scale, present, FORMAT, MASKED))
    u = first_column(finish(u, up_scale, present, FORMAT, MASKED))
    bits = tl.where(pair % SLOTS < TOP_K, limit_bits, shared_limit_bits)
    h = clipped_swiglu(g, u, bits.to(tl.float32, bitcast=True))
    out = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    tl.store(hidden + pair.to(tl.int64) * INNER + out, h.to(tl.bfloat16), mask=out < INNER)


@triton.jit
def few_down(
    hidden,
    ids,
    mix,
    down,
    down_scales,
    y,
    D: tl.constexpr,
    INNER: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    DEALT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """`y [t, D]` = the mixed outputs of a token's experts; the grid is `[t, tiles]`.

    Each of `SPLITS` groups of warps takes one expert, so all the bytes of an output tile are in flight in one
    program and nothing is left to reduce. The shared expert's features are dealt out among all of them.
    """
    token = tl.program_id(0)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[None, :, None]
    split = tl.arange(0, SPLITS)[:, None, None]
    slot = token * SLOTS + split
    column = tl.zeros([1, 1, COLUMNS], tl.int32)
    taken = split < TOP_K
    expert = tl.load(ids + slot, mask=taken, other=0).to(tl.int64)
    if DEALT:
        taken = taken & (expert >= 0)
        expert = tl.maximum(expert, 0)
    weight = tl.load(mix + slot, mask=taken, other=0.0)
    present = (row < D) & taken
    rows = row_start(down, expert, row, D, INNER, FORMAT)
    scales = scale_start(down_scales, expert, row, D, INNER, FORMAT)
    tokens = hidden + tl.where(taken, slot, token * SLOTS).to(tl.int64) * INNER + column
    MASKED: tl.constexpr = D % ROWS != 0 or INNER % BLOCK_K != 0 or SPLITS != TOP_K or DEALT
    total = tl.zeros([SPLITS, ROWS, COLUMNS], tl.float32)
    for block in tl.range(0, tl.cdiv(INNER, BLOCK_K), num_stages=STAGES):
        total = add_block(
            total, rows, scales, tokens, block, present, D, INNER, FORMAT, BLOCK_K, MASKED, INTERPRETED
        )
    total = finish(total, scales, present, FORMAT, MASKED) * weight
    if DEALT:
        total = tl.where(taken, total, 0.0)  # what nobody wrote of `hidden` may be NaN
    if SLOTS > TOP_K:
        shared = tl.load(ids + token * SLOTS + TOP_K).to(tl.int64)
        rows = row_start(down, shared, row, D, INNER, FORMAT)
        scales = scale_start(down_scales, shared, row, D, INNER, FORMAT)
        tokens = hidden + (token * SLOTS + TOP_K).to(tl.int64) * INNER + split * 0 + column
        here = row < D
        UNEVEN: tl.constexpr = D % ROWS != 0 or INNER % (BLOCK_K * SPLITS) != 0
        extra = tl.zeros([SPLITS, ROWS, COLUMNS], tl.float32)
        for step in tl.range(0, tl.cdiv(INNER, BLOCK_K * SPLITS), num_stages=STAGES):
            block = step * SPLITS + split
            extra = add_block(
                extra, rows, scales, tokens, block, here, D, INNER, FORMAT, BLOCK_K, UNEVEN, INTERPRETED
            )
        total += finish(extra, scales, here, FORMAT, UNEVEN)
    out = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    tl.store(y + token.to(tl.int64) * D + out, first_column(total).to(y.dtype.element_ty), mask=out < D)


@triton.jit
def first_column(sums):
    """`[SPLITS, ROWS, COLUMNS]` to `[ROWS]`: add the groups of warps, drop the copy."""
    column = tl.arange(0, COLUMNS)[None, :]
    return tl.sum(tl.where(column == 0, tl.sum(sums, 0), 0.0), 1)
