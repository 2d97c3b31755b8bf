"""Dense algebra on torch tensors: checks, tilings, launches. Nothing waits for the device.

On CUDA tensors the kernels run on the GPU; on CPU tensors in Triton's interpreter (`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton

from ..sparse_moe import pack
from ..sparse_moe.weights import DTYPES, Matrix, expect
from . import linear as products
from . import rows

if TYPE_CHECKING:
    from torch import Tensor

FEW = 16  # tokens whose activations lie in one tile beside the weights
# No measurement stands behind these tilings: of few rows and many splits, since one token's matrix has to be
# read by all multiprocessors at once; of square tiles where tokens are many.
FEW_ROWS, FEW_SPLITS, FEW_WARPS, FEW_STAGES = 16, 4, 4, 3
# (tokens up to, rows, warps); of some tens of tokens a matrix is read as if they were few.
TILES = ((128, 32, 4), (1 << 30, 128, 8))
TOKENS, STAGES = 64, 3
BLOCK_K = 128
BLOCK = 1024


def linear(x: Tensor, matrix: Matrix, kind: pack.Format, shape: tuple[int, int]) -> Tensor:
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
    scales = matrix.values if matrix.scales is None else matrix.scales
    fixed = {"N": n, "K": k, "FORMAT": kind, "BLOCK_K": BLOCK_K}
    fixed["INTERPRETED"] = triton.knobs.runtime.interpret
    if 0 < t <= FEW:
        columns = max(2, triton.next_power_of_2(t))
        products.few_linear[(triton.cdiv(n, FEW_ROWS),)](
            x,
            matrix.values,
            scales,
            y,
            t,
            **fixed,
            ROWS=FEW_ROWS,
            TOKENS=columns,
            SPLITS=FEW_SPLITS,
            STAGES=FEW_STAGES,
            num_warps=FEW_WARPS,
            num_stages=FEW_STAGES,
        )
    elif t:
        height, warps = next((height, warps) for most, height, warps in TILES if t <= most)
        products.linear[triton.cdiv(n, height), triton.cdiv(t, TOKENS)](
            x,
            matrix.values,
            scales,
            y,
            t,
            **fixed,
            ROWS=height,
            TOKENS=TOKENS,
            STAGES=STAGES,
            num_warps=warps,
            num_stages=STAGES,
        )
    return y


def rms_norm(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """`x [t, D]` of any floating type, normed by row; `gamma [D]` fp32."""
    expect("gamma", gamma, (x.shape[1],), torch.float32, x.device)
    x, y = x.contiguous(), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(x):
        width = triton.next_power_of_2(x.shape[1])
        rows.rms_norm[(len(x),)](x, gamma, y, D=x.shape[1], EPS=eps, BLOCK=width, num_warps=8)
    return y


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """`min(silu(gate), limit) * clamp(up, -limit, limit)`; a limit of 0 is none."""
    gate, up = gate.contiguous(), up.contiguous()
    expect("up", up, tuple(gate.shape), gate.dtype, gate.device)
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if count := gate.numel():
        rows.swiglu[(triton.cdiv(count, BLOCK),)](gate, up, y, count, limit or math.inf, BLOCK=BLOCK)
    return y
