"""Many tokens: products over tokens sorted by expert (`sorting.py`), then each token's slots in order."""

import triton
import triton.language as tl

from .products import add_block, clipped_swiglu, finish, row_start, scale_start


@triton.jit
def grouped_gate_up(
    x,
    order,
    tiles,
    gate,
    gate_scales,
    up,
    up_scales,
    hidden,
    limit_bits,
    shared_limit_bits,
    most_tiles,
    D: tl.constexpr,
    INNER: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """`hidden [pairs, INNER]` bf16 in the sorted order; the grid is `[row tiles, most_tiles]`.

    Programs without a tile leave at once: how many tiles there are is known on the device alone. Places after
    a tile's last repeat that pair and are not written.
    """
    tile = tl.program_id(1)
    if tile < tl.load(tiles):
        expert = tl.load(tiles + 1 + tile).to(tl.int64)
        start = tl.load(tiles + 1 + most_tiles + tile)
        end = tl.load(tiles + 1 + 2 * most_tiles + tile)
        place = start + tl.arange(0, TOKENS)
        pair = tl.load(order + tl.minimum(place, end - 1))
        tokens = x + (pair // SLOTS).to(tl.int64)[None, :] * D
        row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
        present = row < INNER
        gate_rows = row_start(gate, expert, row, INNER, D, FORMAT)
        up_rows = row_start(up, expert, row, INNER, D, FORMAT)
        gate_scale = scale_start(gate_scales, expert, row, INNER, D, FORMAT)
        up_scale = scale_start(up_scales, expert, row, INNER, D, FORMAT)
        MASKED: tl.constexpr = INNER % ROWS != 0 or D % BLOCK_K != 0
        g = tl.zeros([ROWS, TOKENS], tl.float32)
        u = tl.zeros([ROWS, TOKENS], tl.float32)
        for block in tl.range(0, tl.cdiv(D, BLOCK_K), num_stages=STAGES):
            g = add_block(
                g,
                gate_rows,
                gate_scale,
                tokens,
                block,
                present,
                INNER,
                D,
                FORMAT,
                BLOCK_K,
                MASKED,
                INTERPRETED,
            )
            u = add_block(
                u, up_rows, up_scale, tokens, block, present, INNER, D, FORMAT, BLOCK_K, MASKED, INTERPRETED
            )
        g = finish(g, gate_scale, present, FORMAT, MASKED)
        u = finish(u, up_scale, present, FORMAT, MASKED)
        bits = tl.where(expert < EXPERTS, limit_bits, shared_limit_bits)
        h = clipped_swiglu(g, u, bits.to(tl.float32, bitcast=True))
        out = hidden + place.to(tl.int64)[None, :] * INNER + row
        tl.store(out, h.to(tl.bfloat16), mask=present & (place < end)[None, :])


@triton.jit
def grouped_down(
    hidden,
    order,
    tiles,
    mix,
    down,
    down_scales,
    partial,
    most_tiles,
    D: tl.constexpr,
    INNER: tl.constexpr,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """`partial [pairs, D]` fp32 in the tokens' order, weighed; the grid is `[row tiles, most_tiles]`."""
    tile = tl.program_id(1)
    if tile < tl.load(tiles):
        expert = tl.load(tiles + 1 + tile).to(tl.int64)
        start = tl.load(tiles + 1 + most_tiles + tile)
        end = tl.load(tiles + 1 + 2 * most_tiles + tile)
        place = start + tl.arange(0, TOKENS)
        pair = tl.load(order + tl.minimum(place, end - 1))
        tokens = hidden + tl.minimum(place, end - 1).to(tl.int64)[None, :] * INNER
        row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
        present = row < D
        rows = row_start(down, expert, row, D, INNER, FORMAT)
        scales = scale_start(down_scales, expert, row, D, INNER, FORMAT)
        MASKED: tl.constexpr = D % ROWS != 0 or INNER % BLOCK_K != 0
        total = tl.zeros([ROWS, TOKENS], tl.float32)
        for block in tl.range(0, tl.cdiv(INNER, BLOCK_K), num_stages=STAGES):
            total = add_block(
                total, rows, scales, tokens, block, present, D, INNER, FORMAT, BLOCK_K, MASKED, INTERPRETED
            )
        total = finish(total, scales, present, FORMAT, MASKED) * tl.load(mix + pair)[None, :]
        out = partial + pair.to(tl.int64)[None, :] * D + row
        tl.store(out, total, mask=present & (place < end)[None, :])


@triton.jit
def combine(partial, ids, y, D: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr, DEALT: tl.constexpr):
    """`y [t, D]` = the sum of a token's slots, ascending ids first; the grid is `[t, blocks]`.

    Where experts are `DEALT` out, slots with id -1 of `ids [t * SLOTS]` are another device's.
    """
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for slot in tl.static_range(SLOTS):
        row = partial + (token * SLOTS + slot).to(tl.int64) * D
        present = column < D
        if DEALT:
            present = present & (tl.load(ids + token * SLOTS + slot) >= 0)
        total += tl.load(row + column, mask=present, other=0.0)
    tl.store(y + token.to(tl.int64) * D + column, total.to(y.dtype.element_ty), mask=column < D)
