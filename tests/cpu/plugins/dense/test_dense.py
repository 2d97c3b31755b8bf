"""Dense kernels in Triton's interpreter against their definitions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from step35_trt.dialects.torch import SequenceBatch, TorchOps
from step35_trt.kernels import plugin
from step35_trt.runtime.device.device_weights import DeviceWeights, kernel_format, kernel_int4
from step35_trt.runtime.programs.program_weights import decoded
from step35_trt.weight_forms import WeightForm, pack

dense = plugin.load("dense", "launch")
OPS = TorchOps(None, SequenceBatch((), (), ()))


def form_of(kind: str, n: int, k: int) -> WeightForm:
    if kind == "int4":
        return WeightForm("int4", (n, k), "float32", (n, k // 128), (1, 128))
    if kind == "fp8_channel":
        return WeightForm("float8_e4m3fn", (n, k), "float32", (n,), (1, k))
    return WeightForm("float8_e4m3fn", (n, k), "float32", (-(-n // 128), -(-k // 128)), (128, 128))


def weights_of(form: WeightForm, seed: int, *, compiled: bool = True) -> DeviceWeights:
    weight = np.random.default_rng(seed).normal(size=form.shape).astype(np.float32)
    packed = pack(weight, form)
    stored = packed.values
    if form.dtype == "float8_e4m3fn":
        values = torch.from_numpy(stored.view(np.uint8)).view(torch.float8_e4m3fn)
    else:
        values = torch.from_numpy(stored)
    source: Any = SimpleNamespace(dense=lambda _: (values, torch.from_numpy(packed.scales)))

    class Forms:
        activation = "bfloat16"

        def __call__(self, name: str) -> WeightForm:
            return form

    forms: Any = Forms()
    return DeviceWeights(source, forms, torch.device("cpu"), compiled=compiled)


@settings(max_examples=12, deadline=None)
@given(
    kind=st.sampled_from(["int4", "fp8_channel", "fp8_block"]),
    tokens=st.sampled_from([1, 2, 5, 16, 17, 70]),
    n=st.integers(1, 150),
    blocks=st.integers(1, 5),
    seed=st.integers(0, 9),
)
def test_a_coded_matrix_is_multiplied(kind: str, tokens: int, n: int, blocks: int, seed: int) -> None:
    form = form_of(kind, n, 128 * blocks)
    weights = weights_of(form, seed)
    x = torch.randn(tokens, 128 * blocks, generator=torch.Generator().manual_seed(seed)).bfloat16()
    exact = decoded(*weights._stored("w"), form, torch.float32)
    got, want = weights.linear(x, "w"), x.float() @ exact.T
    assert kernel_format(form) == kind
    assert (got.shape, got.dtype) == (want.shape, torch.bfloat16)
    assert (got.float() - want).abs().max() <= 2**-8 * want.abs().max() + 1e-6  # int4 scales round to fp16


def test_what_no_kernel_takes_is_decoded_once() -> None:
    form = WeightForm("int4", (16, 96), "float32", (16, 3), (1, 32))
    weights, x = weights_of(form, 0), torch.randn(3, 96).bfloat16()
    assert kernel_format(form) is None
    want = weights_of(form, 0, compiled=False).linear(x, "w")
    torch.testing.assert_close(weights.linear(x, "w"), want)
    assert weights._dense["w"][1] is None
    torch.testing.assert_close(weights.linear(x, "w"), want)


@settings(max_examples=10, deadline=None)
@given(n=st.integers(1, 9), blocks=st.integers(1, 5), seed=st.integers(0, 99))
def test_int4_is_laid_out_as_for_experts(n: int, blocks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (n, 128 * blocks)).astype(np.uint8)
    scales = rng.random((n, blocks)).astype(np.float32)
    signed = codes ^ 8
    pairs = torch.from_numpy(signed[:, 0::2] | signed[:, 1::2] << 4)
    words, halves = kernel_int4(pairs, torch.from_numpy(scales))
    want = plugin.load("sparse_moe", "pack").pack_int4(codes, scales)
    np.testing.assert_array_equal(words.numpy(), want[0])
    np.testing.assert_array_equal(halves.numpy(), want[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, other = torch.randn(2, 3, 1500, generator=generator).to(dtype) * 3
    gamma = torch.rand(1500, generator=generator)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 2e-2}
    torch.testing.assert_close(dense.rms_norm(x, gamma, 1e-5), OPS.rms_norm(x, gamma, 1e-5), **tolerance)
    for limit in (0.0, 0.7):
        torch.testing.assert_close(dense.swiglu(x, other, limit), OPS.swiglu(x, other, limit), **tolerance)
    assert dense.rms_norm(x[:0], gamma, 1e-5).shape == (0, 1500)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="gamma"):
        dense.rms_norm(torch.ones(1, 4), torch.ones(5), 1e-5)
    weights = weights_of(form_of("fp8_channel", 8, 128), 0)
    with pytest.raises(ValueError, match="x is"):
        weights.linear(torch.ones(1, 64).bfloat16(), "w")
