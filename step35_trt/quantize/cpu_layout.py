"""The form in which the CPU operators take 4-bit weights (`plugins/cpu/int4.h`): tiles of 16 rows.

A tile is one stream of `K / 8` groups of 64 bytes; in each, row r owns bytes `4r .. 4r + 3`, and byte j holds
the codes of columns `8c + j` (low nibble) and `8c + 4 + j`. Row groups are independent, so a weight can be
written as it is read; only the last group of rows is padded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np

from step35_trt.errors import UnsupportedError

if TYPE_CHECKING:
    from numpy.typing import NDArray

S = TypeVar("S", bound=np.generic)

TILE = 16
MOST_BLOCK = 128


def tiled_shapes(shape: tuple[int, ...], block: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the tiles (uint8) and their scales (fp16) for a weight `[..., N, K]`.

    Raises:
        UnsupportedError: the operators do not take that block.
    """
    *stack, n, k = shape
    if block % 16 or not 16 <= block <= MOST_BLOCK or k % block:
        raise UnsupportedError(f"the CPU operators take no blocks of {block} in rows of {k}")
    tiles = -(-n // TILE)
    return (*stack, tiles, k // 8, 4 * TILE), (*stack, tiles, k // block, TILE)


def tile(
    codes: NDArray[np.uint8], scales: NDArray[np.floating]
) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Lay out what `quantize_blocks(weight, 4, block)` gives.

    Args:
        codes: `[..., N, K / 2]`, low nibble first. To write a weight piece by piece, give all but the last
            piece a multiple of 16 rows.
        scales: `[..., N, K / block]`.

    Returns:
        `[..., ceil(N / 16), K / 8, 64]` and `[..., ceil(N / 16), K / block, 16]`; rows beyond N are zero.

    Raises:
        UnsupportedError: a scale does not fit fp16.
    """
    if scales.size and not np.abs(scales).max() <= np.finfo(np.float16).max:
        raise UnsupportedError("a weight is too large for the CPU operators' fp16 scales")
    words = _tiles_of_rows(np.ascontiguousarray(codes).view(np.uint32))
    # Nibbles 0 .. 7 of a word become 0 4 1 5 2 6 3 7: swap the middle bytes, then the middle nibbles.
    for shift, mask in ((8, 0x0000FF00), (4, 0x00F000F0)):
        differ = (words ^ (words >> np.uint32(shift))) & np.uint32(mask)
        words ^= differ ^ (differ << np.uint32(shift))
    return words.view(np.uint8), _tiles_of_rows(scales.astype(np.float16))


def interleave_gate_up(gate: NDArray[S], up: NDArray[S]) -> NDArray[S]:
    """Rows `[..., I, n]` of both as the expert operator takes them: 16 of one, 16 of the other, in turn."""
    *stack, width, n = gate.shape
    if width % TILE:
        raise UnsupportedError(f"the CPU operators take no experts of {width} features")
    parts = [part.reshape(*stack, width // TILE, 1, TILE, n) for part in (gate, up)]
    return np.concatenate(parts, axis=-3).reshape(*stack, 2 * width, n)


def _tiles_of_rows(values: NDArray[S]) -> NDArray[S]:
    """`[..., N, n]` to a new `[..., ceil(N / 16), n, 16]`."""
    *stack, rows, n = values.shape
    if spare := -rows % TILE:
        values = np.concatenate([values, np.zeros((*stack, spare, n), values.dtype)], axis=-2)
    return np.array(values.reshape(*stack, -1, TILE, n).swapaxes(-1, -2), order="C")
