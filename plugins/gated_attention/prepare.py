"""Before attention: q and k are normed and turned, k and v go to their pages."""

import triton
import triton.language as tl

from .angles import cosine_sine
from .tiles import tile_offset

E4M3_LARGEST = tl.constexpr(448.0)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """`x` in `dtype`; e4m3 has no infinity, so what exceeds it becomes its largest number."""
    if dtype == tl.float8e4nv:
        x = tl.minimum(tl.maximum(x, -E4M3_LARGEST), E4M3_LARGEST)
    return x.to(dtype)


@triton.jit
def norm_and_turn(
    source,
    target,
    present,
    gamma,
    cos,
    sin,
    factor,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIRS_TILE: tl.constexpr,
    REST_TILE: tl.constexpr,
    EPS: tl.constexpr,
):
    """RMSNorm and half-split rotation of one head a row, times `factor`.

    `source`, `target` `[rows]` point to heads; `cos`, `sin` are `[PAIRS_TILE]`. The two halves that turn and
    the rest are tiles of their own, so that no element changes its thread.
    """
    pair = tl.arange(0, PAIRS_TILE)
    turned = pair < PAIRS
    mask = present[:, None] & turned[None, :]
    first = tl.load(source[:, None] + pair[None, :], mask, other=0.0).to(tl.float32)
    second = tl.load(source[:, None] + PAIRS + pair[None, :], mask, other=0.0).to(tl.float32)
    squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
    if REST_TILE:
        rest = tl.arange(0, REST_TILE)
        kept = rest < D - 2 * PAIRS
        rest_mask = present[:, None] & kept[None, :]
        still = tl.load(source[:, None] + 2 * PAIRS + rest[None, :], rest_mask, other=0.0).to(tl.float32)
        squares += tl.sum(still * still, 1)
    scale = tl.rsqrt(squares / D + EPS) * factor
    first = first * scale[:, None] * tl.load(gamma + pair, turned, other=0.0)[None, :]
    second = second * scale[:, None] * tl.load(gamma + PAIRS + pair, turned, other=0.0)[None, :]
    dtype: tl.constexpr = target.dtype.element_ty
    tl.store(
        target[:, None] + pair[None, :],
        rounded(first * cos[None, :] - second * sin[None, :], dtype),
        mask,
    )
    tl.store(
        target[:, None] + PAIRS + pair[None, :],
        rounded(second * cos[None, :] + first * sin[None, :], dtype),
        mask,
    )
    if REST_TILE:
        still = still * scale[:, None] * tl.load(gamma + 2 * PAIRS + rest, kept, other=0.0)[None, :]
        tl.store(target[:, None] + 2 * PAIRS + rest[None, :], rounded(still, dtype), rest_mask)


@triton.jit
def prepare(
    q,
    k,
    v,
    q_gamma,
    k_gamma,
    frequencies,
    token_sequence,
    starts,
    pasts,
    table,
    key_scale,
    value_scale,
    queries,
    keys,
    values,
    table_pages,
    KV_HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIRS_TILE: tl.constexpr,
    REST_TILE: tl.constexpr,
    D_TILE: tl.constexpr,
    PAGE: tl.constexpr,
    EPS: tl.constexpr,
):
    """A program takes one token and one KV head: its query heads, its key and its value.

    `q [t, H*d]`, `k, v [t, G*d]`, `queries [t, H, d]`, `keys, values [pages, G, PAGE, d]`,
    `table [sequences, table_pages]`; the grid is `[t, G]`.
    """
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    sequence = tl.load(token_sequence + token)
    position = tl.load(pasts + sequence) + tl.program_id(0) - tl.load(starts + sequence)
    pair = tl.arange(0, PAIRS_TILE)
    cos, sin = cosine_sine(position.to(tl.float32) * tl.load(frequencies + pair, pair < PAIRS, other=0.0))

    row = tl.arange(0, ROWS)
    heads = (token * KV_HEADS + group) * SHARE + row
    norm_and_turn(
        q + heads * D,
        queries + heads * D,
        row < SHARE,
        q_gamma,
        cos,
        sin,
        1.0,
        D,
        PAIRS,
        PAIRS_TILE,
        REST_TILE,
        EPS,
    )

    slot = tile_offset(table + sequence * table_pages, table_pages, group, position, KV_HEADS, PAGE, D)
    one = tl.arange(0, 1)
    head = (token * KV_HEADS + group) * D
    norm_and_turn(
        k + head + one, keys + slot + one, one == 0, k_gamma, cos, sin, 1.0 / tl.load(key_scale + group),
        D, PAIRS, PAIRS_TILE, REST_TILE, EPS,
    )  # fmt: skip
    column = tl.arange(0, D_TILE)
    value = tl.load(v + head + column, column < D, other=0.0).to(tl.float32) / tl.load(value_scale + group)
    tl.store(values + slot + column, rounded(value, values.dtype.element_ty), column < D)
