"""What stored codes and tiles stand for: the inverses of what the package writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def dequantize_blocks(
    codes: NDArray[np.uint8], scales: NDArray[np.floating], bits: int
) -> NDArray[np.float32]:
    """The inverse of `blocks.quantize_blocks`: `[..., K]` fp32."""
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1)
    centred = codes.astype(np.float32) - (1 << (bits - 1))
    blocks = centred.reshape(*scales.shape, -1) * scales.astype(np.float32)[..., None]
    return blocks.reshape(codes.shape)


def untile(
    tiles: NDArray[np.uint8], scales: NDArray[np.float16], rows: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The inverse of `cpu_layout.tile` for a weight of `rows` rows."""
    words = tiles.view(np.uint32).copy()
    for shift, mask in ((4, 0x00F000F0), (8, 0x0000FF00)):
        differ = (words ^ (words >> np.uint32(shift))) & np.uint32(mask)
        words ^= differ ^ (differ << np.uint32(shift))
    codes = np.ascontiguousarray(_rows_of_tiles(words, rows)).view(np.uint8)
    return codes, _rows_of_tiles(scales, rows).astype(np.float32)


def _rows_of_tiles(values: np.ndarray, rows: int) -> np.ndarray:
    *stack, _, n, _ = values.shape
    return values.swapaxes(-1, -2).reshape(*stack, -1, n)[..., :rows, :]
