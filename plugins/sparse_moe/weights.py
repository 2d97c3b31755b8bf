"""Expert weights on a device, and what they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from . import pack

if TYPE_CHECKING:
    from torch import Tensor

    from .geometry import Geometry

DTYPES: dict[pack.Format, tuple[torch.dtype, torch.dtype]] = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp8_channel": (torch.float8_e4m3fn, torch.float32),
    "fp8_block": (torch.float8_e4m3fn, torch.float32),
    "int4": (torch.int16, torch.int32),
}
"""Types of values and scales."""


@dataclass(frozen=True)
class Matrix:
    """One projection of all experts; shapes in `pack.py`."""

    values: Tensor
    scales: Tensor | None

    def expert(self, kind: pack.Format, index: int) -> Tensor:
        """`[N, K]` fp32 of one expert."""
        values = self.values[index]
        if self.scales is None:
            return values.float()
        if kind == "int4":
            codes, groups = unpack_int4(values, self.scales[index])
            return (codes.float() - 8) * groups.float().repeat_interleave(pack.GROUP, 1)
        scales = self.scales[index]
        if kind == "fp8_channel":
            return values.float() * scales[:, None]
        wide = scales.repeat_interleave(pack.GROUP, 0).repeat_interleave(pack.GROUP, 1)
        return values.float() * wide[: values.shape[0], : values.shape[1]]


@dataclass(frozen=True)
class ExpertWeights:
    """`gate` and `up` `[stack, inner, hidden]`, `down` `[stack, hidden, inner]`."""

    gate: Matrix
    up: Matrix
    down: Matrix

    def check(self, geometry: Geometry, device: torch.device) -> None:
        """Kernels index without bounds: whatever they rely on is checked here.

        Raises:
            ValueError: a tensor is not what `geometry` says.
            UnsupportedError: the format does not take these widths.
        """
        g = geometry
        widths = {"gate": (g.inner, g.hidden), "up": (g.inner, g.hidden), "down": (g.hidden, g.inner)}
        for name, (n, k) in widths.items():
            matrix: Matrix = getattr(self, name)
            value_shape, scale_shape = pack.shapes(g.format, n, k)
            value_type, scale_type = DTYPES[g.format]
            expect(f"{name}.values", matrix.values, (g.stack, *value_shape), value_type, device)
            if (matrix.scales is None) != (not scale_shape):
                raise ValueError(f"{name}.scales: {g.format} {'has' if scale_shape else 'takes no'} scales")
            if matrix.scales is not None:
                expect(f"{name}.scales", matrix.scales, (g.stack, *scale_shape), scale_type, device)


def unpack_int4(words: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """`pack.unpack_int4` of one matrix on its device: codes `[N, K]` uint8, scales `[N, K / 128]` fp16."""
    n, quarter = words.shape
    shifts = torch.arange(0, 16, 4, dtype=torch.int32, device=words.device)[:, None]
    codes = words.int().view(n, -1, 1, 32) >> shifts & 15
    halves = pairs.T.clone(memory_format=torch.contiguous_format).view(torch.float16)
    return codes.to(torch.uint8).reshape(n, 4 * quarter), halves[:, : quarter * 4 // pack.GROUP]


def expect(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Raise `ValueError` unless `tensor` is contiguous and of that shape, type and device."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} {tensor.dtype} where contiguous {shape} {dtype} is needed"
        )
    if tensor.device != device:
        raise ValueError(f"{name} lies on {tensor.device}, x on {device}")
