"""Round-to-nearest integers in blocks along the input features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def block_size(most: int, *features: int) -> int:
    """The largest power of two up to `most`, at least 16, that divides every width; 0 where there is none."""
    size = most
    while size >= 16 and any(width % size for width in features):
        size //= 2
    return size if size >= 16 else 0


def quantize_blocks(
    weight: NDArray[np.float32], bits: int, block: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Symmetric blocks: codes 0 .. 2^bits - 1 around 2^(bits-1), `weight = (code - 2^(bits-1)) * scale`.

    The scale's sign puts the block's largest magnitude at the end of the range that has one step more, so
    that value is exact. A block of zeros gets scale 0.

    Args:
        weight: `[..., K]`, finite.
        bits: 4 or 8.
        block: Values that share a scale; divides K.

    Returns:
        Codes `[..., K * bits / 8]`, low nibble first, and scales `[..., K / block]` fp32.
    """
    half = 1 << (bits - 1)
    blocks = weight.reshape(*weight.shape[:-1], -1, block)
    low, high = blocks.min(-1), blocks.max(-1)
    extreme = np.where(-low > high, low, high)
    scales = extreme / np.float32(-half)
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales != 0)
    codes = blocks * inverse[..., None]
    np.rint(codes, out=codes)
    codes += half
    np.clip(codes, 0, 2 * half - 1, out=codes)
    packed = codes.astype(np.uint8).reshape(weight.shape)
    if bits == 4:
        packed = packed[..., 0::2] | packed[..., 1::2] << 4
    return packed, scales


def dequantize_blocks(
    codes: NDArray[np.uint8], scales: NDArray[np.float32], bits: int
) -> NDArray[np.float32]:
    """The inverse: `[..., K]` fp32."""
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1)
    centred = codes.astype(np.float32) - (1 << (bits - 1))
    blocks = centred.reshape(*scales.shape, -1) * scales[..., None]
    return blocks.reshape(codes.shape)
