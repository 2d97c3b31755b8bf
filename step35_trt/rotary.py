"""Rotary frequencies of a layer (specification 2.4, point 3)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from step35_trt.config import LayerSpec


def inverse_frequencies(layer: LayerSpec) -> NDArray[np.float32]:
    """Radians per position of each rotated pair, `[rotary_dims / 2]` fp32.

    The exponent's denominator is the number of rotated dimensions, not the head's. Llama-3 scaling divides
    long wavelengths by `factor`, leaves short ones and blends between; computed in fp64, rounded once.
    """
    r = layer.rotary_dims
    inverse = layer.rope_theta ** -(np.arange(0, r, 2, dtype=np.float64) / r)
    scaling = layer.rope_scaling
    if scaling is not None:
        turns = scaling.original_max_position_embeddings * inverse / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 0: long wave, divided; 1: short, untouched
        inverse = (1 - kept) * inverse / scaling.factor + kept * inverse
    return inverse.astype(np.float32)


def angles(layer: LayerSpec, length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosine and sine of positions `0 .. length-1`, each `[length, rotary_dims / 2]` fp32."""
    turn = np.arange(length, dtype=np.float32)[:, None] * inverse_frequencies(layer)
    return np.cos(turn), np.sin(turn)
