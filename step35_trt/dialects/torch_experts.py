"""A checkpoint's experts on a device, in the form in which the kernels take the checkpoint's own codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import torch

from step35_trt.checkpoint import EXPERT_PROJECTIONS
from step35_trt.gpu_forms import GROUP, expert_format
from step35_trt.kernels import plugin

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from step35_trt.checkpoint import Checkpoint
    from step35_trt.program import ExpertFormat


@dataclass(frozen=True)
class Experts:
    """One layer's.

    Attributes:
        format: How they are stored (`plugins/sparse_moe/pack.py`).
        weights: `sparse_moe.weights.ExpertWeights`.
        first: Which expert comes first: where ranks deal them out, a rank has some in a row.
    """

    format: ExpertFormat
    weights: Any
    first: int = 0


def checkpoint_experts(checkpoint: Checkpoint, prefix: str, device: torch.device | str) -> Experts:
    """Experts of `prefix` (`model.layers.3.moe`), expert by expert: FP8 and int4 codes as they are stored.

    What kernels have no format for is rounded to bf16.

    Raises:
        UnsupportedError: kernels do not take int4 rows of that width.
    """
    names = [f"{prefix}.{part}.weight" for part in EXPERT_PROJECTIONS]
    kind = expert_format([checkpoint.codings[name] for name in names])
    module = plugin.load("sparse_moe", "weights")
    return Experts(kind, module.ExpertWeights(*(_matrix(checkpoint, name, kind, device) for name in names)))


def _matrix(checkpoint: Checkpoint, name: str, kind: ExpertFormat, device: torch.device | str) -> Any:
    module, packing = plugin.load("sparse_moe", "weights"), plugin.load("sparse_moe", "pack")
    count, n, k = checkpoint.shape(name)
    value_shape, scale_shape = packing.shapes(kind, n, k)
    value_type, scale_type = module.DTYPES[kind]
    values = torch.empty(count, *value_shape, dtype=value_type, device=device)
    scales = torch.empty(count, *scale_shape, dtype=scale_type, device=device) if scale_shape else None
    for expert in range(count):
        codes, factors = _packed(checkpoint, name, kind, expert)
        values[expert].copy_(_tensor(codes))
        if scales is not None:
            assert factors is not None
            scales[expert].copy_(_tensor(factors))
    return module.Matrix(values, scales)


def _packed(
    checkpoint: Checkpoint, name: str, kind: ExpertFormat, expert: int
) -> tuple[NDArray[np.generic], NDArray[np.generic] | None]:
    """One expert's values and scales."""
    if kind == "bf16":
        return checkpoint.read(name, expert).astype(ml_dtypes.bfloat16), None
    if kind == "int4":
        own = checkpoint.codes(name, slice(expert, expert + 1), 4, GROUP)
        assert own is not None  # the coding is int4 in groups of just that size
        pairs, scales = own[0][0], own[1][0]
        codes = np.stack([pairs & 15, pairs >> 4], -1).reshape(len(pairs), -1)
        words, halves = plugin.load("sparse_moe", "pack").pack_int4(codes, scales)
        return words, halves
    scale_name = checkpoint.codings[name].scale_name(name)
    assert scale_name is not None
    return checkpoint.stored(name)[expert], checkpoint.stored(scale_name)[expert].astype(np.float32)


def _tensor(values: NDArray[np.generic]) -> Tensor:
    """A copy; torch has its own names for the short floating types."""
    for name, carrier in (("bfloat16", np.int16), ("float8_e4m3fn", np.uint8)):
        if values.dtype.name == name:
            return torch.from_numpy(np.array(values.view(carrier))).view(getattr(torch, name))
    return torch.from_numpy(np.array(values))
