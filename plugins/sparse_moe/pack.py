"""The forms in which kernels take expert weights, and the packing of 4-bit codes, in numpy.

A matrix of E experts with N output and K input features:

    format       values                       scales
    bf16         bf16 [E, N, K]               none
    fp8_channel  e4m3 [E, N, K]               fp32 [E, N]
    fp8_block    e4m3 [E, N, K]               fp32 [E, ceil(N / 128), ceil(K / 128)], the checkpoint's own
    int4         int16 [E, N, K / 4]          int32 [E, ceil(K / 256), N], two fp16 each

In `int4` the 32 words of a block of 128 features hold feature 32 j + c in nibble j of word c: eight words,
one 16-byte load, are four tiles of eight neighbours, and neighbouring words unpack in pairs. Codes run from 0
to 15 around 8. Scales of a block lie next to each other, since a tile reads many rows of few blocks; a word
holds those of two blocks, the first in its low half, because an asynchronous copy moves no less than four
bytes.

The two codes with which e4m3 says NaN stand for 480 and -480.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from step35_trt.errors import UnsupportedError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Format = Literal["bf16", "fp8_channel", "fp8_block", "int4"]

GROUP = 128
_NIBBLES = np.arange(0, 16, 4, dtype=np.uint16)[:, None]


def shapes(kind: Format, n: int, k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of one expert's values and scales; `()` where there are none.

    Raises:
        UnsupportedError: the format does not take that width.
    """
    if kind == "int4":
        if k % GROUP:
            raise UnsupportedError(f"int4 experts take rows of a multiple of {GROUP} features, not {k}")
        return (n, k // 4), (-(-k // (2 * GROUP)), n)
    scales = {"bf16": (), "fp8_channel": (n,), "fp8_block": (-(-n // GROUP), -(-k // GROUP))}
    return (n, k), scales[kind]


def pack_int4(
    codes: NDArray[np.uint8], scales: NDArray[np.floating]
) -> tuple[NDArray[np.int16], NDArray[np.int32]]:
    """Lay out `[..., N, K]` codes, one a byte, with scales `[..., N, K / 128]`; any part of a stack at once.

    Returns:
        Words `[..., N, K / 4]` and pairs of scales `[..., ceil(K / 256), N]`; half a pair beyond K is 0.

    Raises:
        UnsupportedError: K is no multiple of 128, or a scale does not fit fp16.
    """
    *stack, n, k = codes.shape
    words_shape, _ = shapes("int4", n, k)
    nibbles = codes.reshape(*stack, n, k // GROUP, 4, 32).astype(np.uint16) << _NIBBLES
    words = np.bitwise_or.reduce(nibbles, axis=-2).reshape(*stack, *words_shape)
    return words.view(np.int16), _pairs(scales)


def repack_int4(
    rows: NDArray[np.uint8], scales: NDArray[np.floating]
) -> tuple[NDArray[np.int16], NDArray[np.int32]]:
    """As `pack_int4` from a checkpoint's bytes `[N / 2, K]` of one matrix, whose codes are never taken apart.

    A byte holds two rows, the even one in its low half, in two's complement (`quantize.formats`); so the
    bytes of a word of either row are halves of two of them put together.
    """
    half, k = rows.shape
    words_shape, _ = shapes("int4", 2 * half, k)
    a, b, c, d = np.moveaxis((rows ^ np.uint8(0x88)).reshape(half, k // GROUP, 4, 32), 2, 0)
    low, high, nibble = np.uint8(15), np.uint8(0xF0), np.uint8(4)
    words = np.empty((half, 2, k // GROUP, 32, 2), np.uint8)
    words[:, 0, ..., 0] = a & low | b << nibble
    words[:, 0, ..., 1] = c & low | d << nibble
    words[:, 1, ..., 0] = a >> nibble | b & high
    words[:, 1, ..., 1] = c >> nibble | d & high
    return words.reshape(2 * half, -1).view("<i2").reshape(words_shape), _pairs(scales)


def _pairs(scales: NDArray[np.floating]) -> NDArray[np.int32]:
    *stack, n, groups = scales.shape
    if scales.size and not np.abs(scales).max() <= np.finfo(np.float16).max:
        raise UnsupportedError("a weight is too large for fp16 scales")
    halves = np.zeros((*stack, n, -(-groups // 2) * 2), np.float16)
    halves[..., :groups] = scales
    return np.ascontiguousarray(halves.view(np.int32).swapaxes(-1, -2))


def unpack_int4(
    words: NDArray[np.int16], pairs: NDArray[np.int32]
) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """The inverse of `pack_int4`."""
    *stack, n, quarter = words.shape
    groups = words.view(np.uint16).reshape(*stack, n, -1, 1, 32)
    codes = (groups >> _NIBBLES & np.uint16(15)).astype(np.uint8).reshape(*stack, n, 4 * quarter)
    halves = np.ascontiguousarray(pairs.swapaxes(-1, -2)).view(np.float16)
    return codes, halves[..., : quarter * 4 // GROUP]
