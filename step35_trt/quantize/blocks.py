"""Round to nearest in blocks: the definition of every quantised format, in numpy.

`native` computes the same bits an order of magnitude faster; the tests compare the two. A block whose scale
would be zero, or denormal in fp32, holds nothing that its format could express: it gets scale 1 and zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

LARGEST_E4M3 = 448  # NVIDIA's e4m3 has no infinities
SMALLEST = np.finfo(np.float32).tiny


def block_size(most: int, *features: int) -> int:
    """The largest power of two up to `most`, at least 16, that divides every width; 0 where there is none."""
    size = most
    while size >= 16 and any(width % size for width in features):
        size //= 2
    return size if size >= 16 else 0


def integers(
    weight: NDArray[np.float32], bits: int, block: int, ratios: NDArray[np.float32] | None = None
) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Symmetric groups along the input features: `weight = code * scale`, -2^(bits-1) <= code < 2^(bits-1).

    The scale's sign puts the group's largest magnitude at the end of the range that has one step more.

    Args:
        weight: `[..., K]`, finite.
        bits: 4 or 8.
        block: Values that share a scale; divides K.
        ratios: fp32 `[..., K / block]`; multiply the largest magnitude before the scale is computed.

    Returns:
        Codes `[..., K]` and scales `[..., K / block]`; a scale that overflows fp16 is infinite.
    """
    half = 1 << (bits - 1)
    blocks = weight.reshape(*weight.shape[:-1], -1, block)
    low, high = blocks.min(-1), blocks.max(-1)
    extreme = np.where(-low > high, low, high)
    if ratios is not None:
        extreme = extreme * ratios
    with np.errstate(over="ignore"):
        scales = (extreme / np.float32(-half)).astype(np.float16)
    scales[scales == 0] = 1
    codes = np.rint(blocks / scales.astype(np.float32)[..., None])
    np.clip(codes, -half, half - 1, out=codes)
    return codes.astype(np.int8).reshape(weight.shape), scales


def fp8(
    weight: NDArray[np.float32], rows: int, columns: int
) -> tuple[NDArray[np.generic], NDArray[np.float32]]:
    """e4m3 in blocks of `rows` x `columns`: `weight = code * scale`, with the largest magnitude as 448.

    Args:
        weight: `[..., N, K]`, finite. The last blocks of N and K may be cut.
        rows: Rows of a block.
        columns: Columns of a block.

    Returns:
        Codes `[..., N, K]` (float8_e4m3fn) and scales `[..., ceil(N / rows), ceil(K / columns)]`.
    """
    *stack, n, k = weight.shape
    margin = [(0, 0)] * len(stack) + [(0, -n % rows), (0, -k % columns)]
    padded = np.pad(weight, margin)
    blocks = padded.reshape(*stack, padded.shape[-2] // rows, rows, padded.shape[-1] // columns, columns)
    scales = np.abs(blocks).max((-3, -1)) / np.float32(LARGEST_E4M3)
    scales[scales < SMALLEST] = 1
    codes = (blocks / scales[..., :, None, :, None]).astype(ml_dtypes.float8_e4m3fn)
    return codes.reshape(padded.shape)[..., :n, :k], scales


def quantize_blocks(
    weight: NDArray[np.float32], bits: int, block: int
) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """`integers` as engines take them: codes 0 .. 2^bits - 1 around 2^(bits-1).

    Returns:
        Codes `[..., K * bits / 8]`, low nibble first, and scales `[..., K / block]`.
    """
    codes, scales = integers(weight, bits, block)
    return offset_codes(codes, bits), scales


def offset_codes(codes: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """Signed codes `[..., K]` as engines take them, `[..., K * bits / 8]`."""
    packed: NDArray[np.uint8] = codes.view(np.uint8) + np.uint8(1 << (bits - 1))
    return packed[..., 0::2] | (packed[..., 1::2] << np.uint8(4)) if bits == 4 else packed
