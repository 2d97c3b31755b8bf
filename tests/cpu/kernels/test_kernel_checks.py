"""What `tests/gpu` runs, small and in the interpreter: where there is no GPU, its code runs all the same."""

from __future__ import annotations

import pytest
import torch

from step35_trt.kernels import tactics
from step35_trt.kernels.plugin import load
from tests.kernel_checks import Layer, attention, check_attention, check_bits, check_capture, check_experts

HOPPER = 90


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("pages", [torch.bfloat16, torch.float8_e4m3fn], ids=["bf16", "fp8"])
def test_attention(window, pages):
    geometry = load("gated_attention", "geometry").Geometry(8, 1, 16, window, 8, 1e-5)
    entries = tactics.load("gated_attention", HOPPER).entries
    check_attention(geometry, (1, 2, 0, 6), (140, 0, 7, 9), pages, entries, "cpu")


def layer(kind):
    geometry = load("sparse_moe", "geometry").Geometry(5, 2, 128, 128, 3.0, kind, True)
    return Layer.of(geometry, tactics.load("sparse_moe", HOPPER).entries, "cpu")


@pytest.mark.parametrize(
    ("kind", "tokens"), [("bf16", 17), ("fp8_channel", 1), ("fp8_block", 1), ("int4", 1)]
)
def test_experts(kind, tokens):
    check_experts(layer(kind), tokens)


def test_bits_and_capture():
    check_bits(layer("int4"), 2, 1)
    check_capture(layer("bf16"), 1, lambda step: step)


def test_the_checks_can_fail(monkeypatch):
    one = layer("bf16")
    one.weights.gate.values.fill_(torch.nan)  # no output may be NaN
    with pytest.raises(AssertionError):
        check_experts(one, 1)
    original = attention.gated_attention
    monkeypatch.setattr(attention, "gated_attention", lambda *given: original(*given) * 1.1)
    with pytest.raises(AssertionError):
        test_attention(0, torch.bfloat16)
    with pytest.raises(AssertionError):
        check_capture(layer("bf16"), 1, lambda step: lambda: None)
