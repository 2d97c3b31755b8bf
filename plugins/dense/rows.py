"""What stands between products, a row of features at a time, in fp32 and rounded once."""

import triton
import triton.language as tl

from ..sparse_moe.products import clipped_swiglu


@triton.jit
def rms_norm(x, gamma, y, D: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """`y [t, D]`, normed by the root mean square of a row, times `gamma [D]` fp32; the grid is `[t]`."""
    start = tl.program_id(0).to(tl.int64) * D
    column = tl.arange(0, BLOCK)
    inside = column < D
    wide = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, 0) / D + EPS)
    result = wide * factor * tl.load(gamma + column, mask=inside, other=0.0)
    tl.store(y + start + column, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def swiglu(gate, up, y, limit, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """`y [t, WIDTH]`; `limit` is infinite where there is none; the grid is `[t, blocks]`.

    Rows are masked one by one: of their width the compiler knows what vectors it divides into.
    """
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    place = tl.program_id(0).to(tl.int64) * WIDTH + column
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, clipped_swiglu(g, u, limit).to(y.dtype.element_ty), mask=inside)
