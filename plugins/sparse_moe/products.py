"""Products of quantised weights with bf16 activations on tensor cores, for tiles of any rank.

A tile of weights has shape `[..., R, K]`, of activations `[..., K, T]`, of results `[..., R, T]`: output
features take the tensor cores' long side, since they are many and tokens can be one.
"""

import triton
import triton.language as tl

# Four results `$0 .. $3` from two neighbouring 16-bit words `$4`: a nibble or-ed into the mantissa of bf16
# 128 is 128 + code exactly, and less 136 that is code - 8: a shift, a LOP3 and an HADD2 for two weights.
NIBBLES = tl.constexpr("""
{
.reg .b32 s1, s2, s3, zero;
shr.u32 s1, $4, 4;
shr.u32 s2, $4, 8;
shr.u32 s3, $4, 12;
mov.b32 zero, 0x43084308;
lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xea;
lop3.b32 $1, s1, 0x000f000f, 0x43004300, 0xea;
lop3.b32 $2, s2, 0x000f000f, 0x43004300, 0xea;
lop3.b32 $3, s3, 0x000f000f, 0x43004300, 0xea;
sub.bf16x2 $0, $0, zero;
sub.bf16x2 $1, $1, zero;
sub.bf16x2 $2, $2, zero;
sub.bf16x2 $3, $3, zero;
}
""")

# Four e4m3 `$2` to bf16 `$0`, `$1`: sign, exponent and mantissa moved to where bf16 has them are the number
# times 2^-120, subnormals included; the product with 2^120 is exact. The machine's own conversions take three
# steps, one of them at an eighth of this one's rate.
E4M3 = tl.constexpr("""
{
.reg .b32 low, high, sign, rise;
mov.b32 rise, 0x7b807b80;
prmt.b32 low, $2, 0, 0x1404;
prmt.b32 high, $2, 0, 0x3424;
and.b32 sign, low, 0x80008000;
shr.u32 low, low, 4;
lop3.b32 low, low, 0x07f007f0, sign, 0xea;
mul.bf16x2 $0, low, rise;
and.b32 sign, high, 0x80008000;
shr.u32 high, high, 4;
lop3.b32 high, high, 0x07f007f0, sign, 0xea;
mul.bf16x2 $1, high, rise;
}
""")

# The same of two, `$1` to `$0`: wgmma takes its left operand in pairs.
E4M3_PAIR = tl.constexpr("""
{
.reg .b32 both, sign, rise;
mov.b32 rise, 0x7b807b80;
cvt.u32.u16 both, $1;
prmt.b32 both, both, 0, 0x1404;
and.b32 sign, both, 0x80008000;
shr.u32 both, both, 4;
lop3.b32 both, both, 0x07f007f0, sign, 0xea;
mul.bf16x2 $0, both, rise;
}
""")


@triton.jit
def nibbles(words, INTERPRETED: tl.constexpr):
    """Codes less 8 of int16 `words` as four tiles, bf16 on a GPU."""
    if INTERPRETED:
        parts = (
            ((words & 15) - 8).to(tl.float32),
            (((words >> 4) & 15) - 8).to(tl.float32),
            (((words >> 8) & 15) - 8).to(tl.float32),
            (((words >> 12) & 15) - 8).to(tl.float32),
        )
    else:
        parts = tl.inline_asm_elementwise(
            NIBBLES,
            "=&r,=&r,=&r,=&r,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    return parts


@triton.jit
def add_product(total, weights, tokens, INTERPRETED: tl.constexpr):
    """`total + weights @ tokens`: exact products of bf16, added in fp32.

    The interpreter multiplies bf16 as if it were integers, so there both are widened first.
    """
    if INTERPRETED:
        weights, tokens = weights.to(tl.float32), tokens.to(tl.float32)
    elif weights.dtype == tl.float8e4nv:
        if len(weights.shape) == 2:
            weights = tl.inline_asm_elementwise(
                E4M3_PAIR, "=r,h", [weights], dtype=tl.bfloat16, is_pure=True, pack=2
            )
        else:
            weights = tl.inline_asm_elementwise(
                E4M3, "=&r,=&r,r", [weights], dtype=tl.bfloat16, is_pure=True, pack=4
            )
    return tl.dot(weights, tokens, total, input_precision="ieee")


@triton.jit
def row_start(values, expert, row, N: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr):
    """Pointers to the first element of each weight row; `expert` is int64."""
    STRIDE: tl.constexpr = K // 4 if FORMAT == "int4" else K
    return values + (expert * N + row) * STRIDE


@triton.jit
def scale_start(scales, expert, row, N: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr):
    """Pointers to each row's first scale."""
    if FORMAT == "int4":
        start = expert * ((K + 255) // 256 * N) + row
    elif FORMAT == "fp8_block":
        start = (expert * ((N + 127) // 128) + row // 128) * ((K + 127) // 128)
    else:
        start = expert * N + row
    return scales + start


@triton.jit
def add_block(
    total,
    rows,
    scales,
    tokens,
    block,
    present,
    N: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Add the product of the features `block * BLOCK_K ..` to `total [..., R, T]` fp32.

    Args:
        total: What there is so far; a scale of whole rows ("fp8_channel") is left to `finish`.
        rows: From `row_start`, `[..., R, 1]`.
        scales: From `scale_start`, `[..., R, 1]`.
        tokens: Pointers to each token's first activation, `[..., 1, T]`.
        block: Which block, a scalar or `[..., 1, 1]`.
        present: Which rows there are, `[..., R, 1]`; looked at if `MASKED`, as are features beyond K.
        N: Rows of a matrix.
        K: Its columns.
        FORMAT: See `pack.py`.
        BLOCK_K: Features at once; 128 for "int4", at most 128 for "fp8_block".
        MASKED: Whether a tile can reach beyond the matrix.
        INTERPRETED: Whether Triton's interpreter runs this, which knows no inline assembly.
    """
    if FORMAT == "int4":
        feature = tl.arange(0, 32)[:, None]
        x = tokens + (block * 128 + feature)
        words = rows + (block * 32 + tl.arange(0, 32)[None, :])
        if MASKED:
            inside = block < K // 128
            word = tl.load(words, mask=present & inside, other=0)
            x0 = tl.load(x, mask=inside & (feature >= 0), other=0.0)
            x1 = tl.load(x + 32, mask=inside & (feature >= 0), other=0.0)
            x2 = tl.load(x + 64, mask=inside & (feature >= 0), other=0.0)
            x3 = tl.load(x + 96, mask=inside & (feature >= 0), other=0.0)
            pair = tl.load(scales + block // 2 * N, mask=present & inside, other=0)
        else:
            word = tl.load(words)
            x0 = tl.load(x)
            x1 = tl.load(x + 32)
            x2 = tl.load(x + 64)
            x3 = tl.load(x + 96)
            pair = tl.load(scales + block // 2 * N)
        # fp16 alone would be too narrow for an asynchronous copy, and the products would wait for it.
        scale = (pair >> (block % 2 * 16)).to(tl.int16).to(tl.float16, bitcast=True)
        w0, w1, w2, w3 = nibbles(word, INTERPRETED)
        part = add_product(tl.zeros_like(total), w0, x0, INTERPRETED)
        part = add_product(part, w1, x1, INTERPRETED)
        part = add_product(part, w2, x2, INTERPRETED)
        part = add_product(part, w3, x3, INTERPRETED)
        total += part * scale.to(tl.float32)
    else:
        column = block * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        feature = block * BLOCK_K + tl.arange(0, BLOCK_K)[:, None]
        if MASKED:
            w = tl.load(rows + column, mask=present & (column < K), other=0.0)
            x = tl.load(tokens + feature, mask=feature < K, other=0.0)
        else:
            w = tl.load(rows + column)
            x = tl.load(tokens + feature)
        if FORMAT == "fp8_block":
            near = scales + block * BLOCK_K // 128
            if MASKED:
                scale = tl.load(near, mask=present & (block * BLOCK_K < K), other=0.0)
            else:
                scale = tl.load(near)
            total += add_product(tl.zeros_like(total), w, x, INTERPRETED) * scale
        else:
            total = add_product(total, w, x, INTERPRETED)
    return total


@triton.jit
def finish(total, scales, present, FORMAT: tl.constexpr, MASKED: tl.constexpr):
    """Scale whole rows, where the format does."""
    if FORMAT == "fp8_channel":
        if MASKED:
            total *= tl.load(scales, mask=present, other=0.0)
        else:
            total *= tl.load(scales)
    return total


@triton.jit
def clipped_swiglu(gate, up, limit):
    """`min(silu(gate), limit) * clamp(up, -limit, limit)` (specification 2.7); NaN stays NaN.

    Without a limit it is infinite.
    """
    activated = gate / (1.0 + tl.exp(-gate))
    activated = tl.where(activated > limit, limit, activated)
    up = tl.where(up > limit, limit, up)
    up = tl.where(up < -limit, -limit, up)
    return activated * up
