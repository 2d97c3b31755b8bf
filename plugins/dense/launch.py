"""Dense algebra on torch tensors: checks, tilings, launches. Nothing waits for the device.

Who carries launches out decides where kernels run; by default Triton does (`step35_trt.kernels.jit`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from step35_trt.kernels.jit import JIT
from step35_trt.kernels.launching import KernelLaunch

from ..sparse_moe import pack
from ..sparse_moe.weights import DTYPES, Matrix, expect
from .geometry import (
    BLOCK,
    GATE_WARPS,
    KERNELS,
    NORM_WARPS,
    PLUGIN,
    ROW_STAGES,
    gate_constants,
    norm_constants,
    tiling,
)

if TYPE_CHECKING:
    from torch import Tensor

    from step35_trt.kernels.launching import Launcher
    from step35_trt.kernels.variant import Constant


def linear(
    x: Tensor, matrix: Matrix, kind: pack.Format, shape: tuple[int, int], launcher: Launcher = JIT
) -> Tensor:
    """`[t, N]` bf16: `x [t, K]` bf16 times a matrix `[N, K]` stored as a stack of one (`sparse_moe/pack.py`).

    Raises:
        ValueError: shapes, types or devices do not fit.
        UnsupportedError: the format does not take that width.
    """
    (n, k), t = shape, len(x)
    expect("x", x, (t, k), torch.bfloat16, x.device)
    value_shape, scale_shape = pack.shapes(kind, n, k)
    value_type, scale_type = DTYPES[kind]
    expect("values", matrix.values, (1, *value_shape), value_type, x.device)
    if matrix.scales is not None:
        expect("scales", matrix.scales, (1, *scale_shape), scale_type, x.device)
    y = torch.empty(t, n, dtype=x.dtype, device=x.device)
    if t:
        chosen = tiling(t)
        blocks = -(-n // chosen.rows), -(-t // chosen.tokens)
        scales = matrix.values if matrix.scales is None else matrix.scales
        _launch(
            launcher,
            chosen.kernel,
            blocks[:1] if chosen.splits else blocks,
            (x, matrix.values, scales, y, t),
            chosen.constants(n, k, kind, interpreted=launcher.interpreted),
            chosen.num_warps,
            chosen.num_stages,
        )
    return y


def rms_norm(x: Tensor, gamma: Tensor, eps: float, launcher: Launcher = JIT) -> Tensor:
    """`x [t, D]` of any floating type, normed by row; `gamma [D]` fp32."""
    t, width = x.shape
    expect("gamma", gamma, (width,), torch.float32, x.device)
    x, y = x.contiguous(), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if t:
        fixed = norm_constants(width, eps)
        _launch(launcher, "rms_norm", (t,), (x, gamma, y), fixed, NORM_WARPS, ROW_STAGES)
    return y


def swiglu(gate: Tensor, up: Tensor, limit: float, launcher: Launcher = JIT) -> Tensor:
    """`min(silu(gate), limit) * clamp(up, -limit, limit)` of `[t, width]`; a limit of 0 is none."""
    gate, up = gate.contiguous(), up.contiguous()
    expect("up", up, tuple(gate.shape), gate.dtype, gate.device)
    (t, width), y = gate.shape, torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if t:
        arguments, fixed = (gate, up, y, float(limit or math.inf)), gate_constants(width)
        _launch(launcher, "swiglu", (t, -(-width // BLOCK)), arguments, fixed, GATE_WARPS, ROW_STAGES)
    return y


def _launch(
    launcher: Launcher,
    kernel: str,
    grid: tuple[int, ...],
    arguments: tuple[Tensor | int | float, ...],
    fixed: dict[str, Constant],
    num_warps: int,
    num_stages: int,
) -> None:
    launcher(KernelLaunch(PLUGIN, KERNELS[kernel], kernel, grid, arguments, fixed, num_warps, num_stages))
