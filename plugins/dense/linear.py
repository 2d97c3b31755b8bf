"""Products with one stored matrix: the experts' tiles (`sparse_moe/products.py`) over a stack of one."""

import triton
import triton.language as tl

from ..sparse_moe.products import add_block, finish, row_start, scale_start


@triton.jit
def linear(
    x,
    values,
    scales,
    y,
    tokens,
    N: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """`y [t, N]` = `x [t, K]` bf16 times the matrix; the grid is `[row tiles, token tiles]`."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    present = row < N
    places = x + tl.minimum(token, tokens - 1).to(tl.int64)[None, :] * K
    first = tl.full([], 0, tl.int64)
    rows = row_start(values, first, row, N, K, FORMAT)
    scale = scale_start(scales, first, row, N, K, FORMAT)
    MASKED: tl.constexpr = N % ROWS != 0 or K % BLOCK_K != 0
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for block in tl.range(0, tl.cdiv(K, BLOCK_K), num_stages=STAGES):
        total = add_block(
            total, rows, scale, places, block, present, N, K, FORMAT, BLOCK_K, MASKED, INTERPRETED
        )
    total = finish(total, scale, present, FORMAT, MASKED)
    out = y + token.to(tl.int64)[None, :] * N + row
    tl.store(out, total.to(y.dtype.element_ty), mask=present & (token < tokens)[None, :])


@triton.jit
def few_linear(
    x,
    values,
    scales,
    y,
    tokens,
    N: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """As `linear` for at most `TOKENS` tokens; the grid is `[row tiles]`, so a weight is read once.

    The features are dealt out block by block to `SPLITS` groups of warps, whose sums are added at the end:
    few rows to a program then still keep enough bytes in flight.
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[None, :, None]
    split = tl.arange(0, SPLITS)[:, None, None]
    token = tl.arange(0, TOKENS)
    present = row < N
    places = x + tl.minimum(token, tokens - 1).to(tl.int64)[None, None, :] * K
    places += tl.zeros([SPLITS, 1, TOKENS], tl.int32)
    first = tl.full([], 0, tl.int64)
    rows = row_start(values, first, row, N, K, FORMAT)
    scale = scale_start(scales, first, row, N, K, FORMAT)
    MASKED: tl.constexpr = N % ROWS != 0 or K % (BLOCK_K * SPLITS) != 0
    total = tl.zeros([SPLITS, ROWS, TOKENS], tl.float32)
    for step in tl.range(0, tl.cdiv(K, BLOCK_K * SPLITS), num_stages=STAGES):
        total = add_block(
            total,
            rows,
            scale,
            places,
            step * SPLITS + split,
            present,
            N,
            K,
            FORMAT,
            BLOCK_K,
            MASKED,
            INTERPRETED,
        )
    total = tl.sum(finish(total, scale, present, FORMAT, MASKED), 0)
    line = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    out = y + token.to(tl.int64)[None, :] * N + line
    tl.store(out, total.to(y.dtype.element_ty), mask=(line < N) & (token < tokens)[None, :])
