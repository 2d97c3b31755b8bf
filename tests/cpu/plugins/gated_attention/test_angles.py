from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from step35_trt.kernels.plugin import load
from tests.cpu.plugins.gated_attention.cases import layer, make, tiling

cosine_sine = load("gated_attention", "angles").cosine_sine


@triton.jit
def evaluate(angle, cos, sin, N: tl.constexpr):
    at = tl.arange(0, N)
    c, s = cosine_sine(tl.load(angle + at))
    tl.store(cos + at, c)
    tl.store(sin + at, s)


@pytest.mark.parametrize("largest", [1.0, 100.0, 262143.0])
def test_an_fp32_angle_turns_as_in_fp64(largest):
    angle = torch.from_numpy(np.random.default_rng(0).uniform(0, largest, 4096).astype(np.float32))
    angle[:2] = torch.tensor([0.0, largest])
    cos, sin = torch.empty_like(angle), torch.empty_like(angle)
    evaluate[(1,)](angle, cos, sin, 4096)
    exact = angle.double()
    assert (cos - exact.cos()).abs().max() < 1.3e-7
    assert (sin - exact.sin()).abs().max() < 1.3e-7


def test_the_last_position_of_the_longest_context():
    """As the definition turns them: angles are rounded to fp32 before they are taken modulo 2 pi."""
    case = make(layer(2, 1, 16, 8, 16), (2, 1), (262_142, 99_999))
    out, cache = case.run(tiling())
    expected, defined = case.defined()
    torch.testing.assert_close(cache.keys, defined.keys, atol=2e-6, rtol=0, equal_nan=True)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)
