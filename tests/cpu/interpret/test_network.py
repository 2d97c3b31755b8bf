"""The interpreter refuses what it does not know, and rounds where the network does."""

from __future__ import annotations

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from step35_trt.dialects.tensorrt_functional import Functional
from step35_trt.dialects.tensorrt_segment import Builder
from step35_trt.errors import UnsupportedError
from step35_trt.interpret.network import evaluate


@cache
def builder() -> Builder:
    return Builder.rtx()


def written() -> Functional:
    return Functional(builder().trt, builder().network(), lambda: "model.layers.2")


def run(f: Functional, **inputs: np.ndarray) -> dict[str, Any]:
    return evaluate(f.trt, f.network, inputs, f.constants)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rounding_is_the_definition_s(dtype: str) -> None:
    """SiLU and norm in fp32, rounded once: bit for bit what torch gives in bf16."""
    f = written()
    x = f.input("x", dtype, (-1, 64))  # type: ignore[arg-type]
    f.output("silu", f.silu(x, dtype))  # type: ignore[arg-type]
    f.output("norm", f.rms_norm(x, f.input("g", "float32", (1, 64)), 1e-5, dtype))  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    values, gamma = rng.normal(0, 4, (50, 64)).astype(np.float32), rng.normal(1, 0.2, 64).astype(np.float32)
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    given = torch.from_numpy(values).to(kind)
    wide = given.float()
    norm = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * torch.from_numpy(gamma)).to(
        kind
    )
    rounded = values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    got = run(f, x=rounded, g=gamma[None])
    for name, want in (("silu", torch.nn.functional.silu(given)), ("norm", norm)):
        difference = np.abs(got[name].astype(np.float32) - want.float().numpy())
        # A last bit of fp32 may turn a rounding, seldom.
        assert (difference > 1e-6).mean() < 1e-3
        assert difference.max() < 0.07


def test_a_sum_in_bf16_is_rounded() -> None:
    f = written()
    a, b = (f.input(name, "bfloat16", (-1, 1)) for name in "ab")
    f.output("y", f.add(a, b))
    got = run(f, a=np.array([[256.0]], ml_dtypes.bfloat16), b=np.array([[1.0]], ml_dtypes.bfloat16))
    assert got["y"].dtype == ml_dtypes.bfloat16
    assert float(got["y"][0, 0]) == 256


def test_int8_rows_are_looked_up() -> None:
    from step35_trt.weight_forms import WeightForm

    form = WeightForm("int8", (10, 32), "float32", (10, 2), (1, 16))
    f = written()
    ids = f.input("ids", "int64", (-1,))
    values, scales = f.input("w", "int8", (10, 32)), f.input("s", "float32", (10, 2))
    f.output("y", f.embedding_int8(ids, values, scales, form, "float32"))
    rng = np.random.default_rng(1)
    codes, factors = (
        rng.integers(-128, 128, (10, 32)).astype(np.int8),
        rng.normal(size=(10, 2)).astype(np.float32),
    )
    index = np.array([3, 3, 9, 0])
    got = run(f, ids=index, w=codes, s=factors)["y"]
    want = (codes.astype(np.float32) * factors.repeat(16, 1))[index]
    np.testing.assert_array_equal(got, want)


def test_what_is_not_given_is_named() -> None:
    f = written()
    f.output("y", f.sigmoid(f.input("x", "float32", (-1, 4))))
    with pytest.raises(UnsupportedError, match="input x is not given"):
        run(f)
    with pytest.raises(UnsupportedError, match=r"input x is FLOAT \[-1, 4\], given is float64 \[2, 4\]"):
        run(f, x=np.zeros((2, 4)))
    with pytest.raises(UnsupportedError, match=r"given is float32 \[2, 5\]"):
        run(f, x=np.zeros((2, 5), np.float32))


def test_an_unknown_layer_is_named() -> None:
    f = written()
    layer = f.network.add_softmax(f.input("x", "float32", (-1, 4)))
    layer.metadata = "model.layers.2"
    f.output("y", layer.get_output(0))
    with pytest.raises(UnsupportedError, match=r"model\.layers\.2: the interpreter knows no layer SOFTMAX"):
        run(f, x=np.zeros((2, 4), np.float32))
