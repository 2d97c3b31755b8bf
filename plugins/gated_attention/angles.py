"""Sine and cosine of rotary angles in fp32, as exact at position 262,143 as at 0."""

import triton
import triton.language as tl

# pi/2 in three pieces of 6 significant bits and a remainder. A piece times a quotient of up to 18 bits is
# exact in fp32, and so is each difference but the last, whether the compiler fuses them or not (W. J. Cody,
# W. Waite, "Software Manual for the Elementary Functions", 1980).
LARGEST = tl.constexpr(262144.0 * 1.5707963)
TWO_OVER_PI = tl.constexpr(0.6366197723675814)
PIECE_1 = tl.constexpr(1.5625)
PIECE_2 = tl.constexpr(0.008056640625)
PIECE_3 = tl.constexpr(0.00023651123046875)
PIECE_4 = tl.constexpr(3.1749393656355096e-06)


@triton.jit
def cosine_sine(angle):
    """Cosine and sine of `angle` (radians, 0 to 4.1e5) to about one unit in the last place of 1."""
    # The model rounds position * frequency to fp32. Without this bound, never reached, the compiler may fuse
    # that product into the subtraction below and keep what the rounding drops: 0.008 rad at 262,143.
    angle = tl.minimum(angle, LARGEST)
    quotient = tl.floor(angle * TWO_OVER_PI + 0.5)
    x = angle - quotient * PIECE_1
    x = x - quotient * PIECE_2
    x = x - quotient * PIECE_3
    x = x - quotient * PIECE_4
    square = x * x
    # Taylor series to x^9 and x^10: below 2e-9 on [-pi/4, pi/4].
    sine = x + x * square * (
        -1.6666667e-1 + square * (8.3333333e-3 + square * (-1.9841270e-4 + square * 2.7557319e-6))
    )
    cosine = 1.0 + square * (
        -0.5
        + square * (4.1666667e-2 + square * (-1.3888889e-3 + square * (2.4801587e-5 - square * 2.7557319e-7)))
    )
    quarter = quotient.to(tl.int32) & 3
    swap = (quarter & 1) == 1
    cos = tl.where(swap, sine, cosine)
    sin = tl.where(swap, cosine, sine)
    cos = tl.where((quarter == 1) | (quarter == 2), -cos, cos)
    sin = tl.where(quarter >= 2, -sin, sin)
    return cos, sin
