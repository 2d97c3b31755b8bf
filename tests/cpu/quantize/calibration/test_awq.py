"""The numerics: ModelOpt's where it has them, the converter's codes, clips that help."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from step35_trt.quantize import blocks
from step35_trt.quantize.calibration import awq
from step35_trt.quantize.calibration.clipping import clip_indices
from step35_trt.quantize.calibration.quantisers import Groups, fake_quantise
from step35_trt.quantize.folding import CLIP_RATIOS
from step35_trt.quantize.formats import Coding


def heavy(rows: int, columns: int, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_t(3, (rows, columns)).astype(np.float32))


@pytest.mark.filterwarnings("ignore")
def test_candidates_and_choice_are_modelopts(monkeypatch: pytest.MonkeyPatch) -> None:
    """`awq_lite` on one linear, where no constraint binds."""
    import modelopt.torch.quantization as mtq

    weight, inputs = heavy(48, 256, 0) * 0.1, heavy(96, 256, 1)
    inputs[:, 5::37] *= 12  # channels that stand out
    linear = nn.Linear(256, 48, bias=False)
    linear.weight.data.copy_(weight)
    config = copy.deepcopy(mtq.INT4_AWQ_CFG)
    config["algorithm"] = {"method": "awq_lite", "alpha_step": 0.1, "debug": True}
    theirs = mtq.quantize(nn.Sequential(linear), config, lambda model: model(inputs))[0]
    helper = theirs.awq_lite

    def their_rounding(values: torch.Tensor, coding: Coding) -> torch.Tensor:
        groups = values.reshape(-1, coding.block)
        step = groups.abs().amax(-1, keepdim=True) / 7
        return ((groups / step).round().clamp(-8, 7) * step - groups).reshape(values.shape)

    monkeypatch.setattr(awq, "rounding_error", their_rounding)
    product = awq.Product("linear", weight, Coding("int4", 128), inputs)
    mean, profile = inputs.abs().mean(0), awq.weight_profile([product])
    torch.testing.assert_close(mean, helper.act_scale)
    torch.testing.assert_close(profile, helper.weight_scale)
    found = awq.search(lambda: [product], mean, profile, torch.clone)
    assert found.alpha == pytest.approx(helper.best_alpha)
    torch.testing.assert_close(found.scale, helper.best_scale)
    assert found.error < 0.9 * found.unscaled
    energy = float((inputs @ weight.T).square().mean())
    assert found.error == pytest.approx(helper.loss[helper.best_alpha] / energy, rel=1e-3)


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(["int4", "int8", "fp8-rows", "fp8-blocks"]),
    rows=st.integers(1, 40),
    groups=st.integers(1, 3),
    block=st.sampled_from([16, 32, 128]),
    seed=st.integers(0, 99),
)
def test_weights_come_back_as_the_converter_stores_them(
    kind: str, rows: int, groups: int, block: int, seed: int
) -> None:
    weight = heavy(rows, groups * block, seed)
    weight[0] = 0  # a row of zeros
    values = weight.numpy()
    clip = torch.from_numpy(np.random.default_rng(seed).integers(0, 17, (rows, groups)).astype(np.uint8))
    if kind in ("int4", "int8"):
        coding = Coding(kind, block)  # type: ignore[arg-type]
        ratios = CLIP_RATIOS[clip.numpy()]
        codes, scales = blocks.integers(values, 4 if kind == "int4" else 8, block, ratios)
        step = np.abs(scales.astype(np.float32)).repeat(block, -1)
        want = codes * scales.astype(np.float32).repeat(block, -1)
        got = fake_quantise(weight, coding, clip).numpy()
    else:
        n, k = (1, groups * block) if kind == "fp8-rows" else (block, block)
        coding = Coding(kind, 0 if kind == "fp8-rows" else block)  # type: ignore[arg-type]
        codes8, scales8 = blocks.fp8(values, n, k)
        factors = scales8.repeat(n, 0)[:rows].repeat(k, 1)[:, : groups * block]
        want, got = codes8.astype(np.float32) * factors, fake_quantise(weight, coding).numpy()
        step = np.maximum(np.abs(want) / 8, factors * 2**-9)
    # Dividing by a scale or multiplying by its inverse may fall on two sides of a tie; rarely.
    assert (np.abs(got - want) <= 1.001 * step).all()
    assert np.isclose(got, want, rtol=1e-5, atol=1e-7).mean() > 0.99


@pytest.mark.parametrize("bits", [4, 8])
def test_searches_round_as_the_quantiser_does(bits: int) -> None:
    groups = Groups.of(heavy(20, 96, 3), bits, 32)
    for ratio in (1.0, 0.75):
        quantised = groups.quantised(ratio) * groups.signs
        torch.testing.assert_close(groups.values + groups.errors(ratio), quantised)


def test_clips_lower_the_error_they_are_chosen_by() -> None:
    weight, coding = heavy(64, 256, 4), Coding("int4", 128)
    inputs = heavy(200, 256, 5)
    inputs[:, 3::50] *= 10
    square = inputs.square().mean(0)
    clip = clip_indices(weight, coding, square)
    assert clip.shape == (64, 2)
    assert 0 < (clip > 0).float().mean() < 1

    def error(found: torch.Tensor | None) -> float:
        return float((inputs @ (fake_quantise(weight, coding, found) - weight).T).square().sum())

    by_weights = clip_indices(weight, coding, None)
    assert error(clip) < error(None)
    assert error(clip) < error(by_weights)
    spared = (fake_quantise(weight, coding, by_weights) - weight).square().sum()
    assert spared < (fake_quantise(weight, coding) - weight).square().sum()


def test_a_scale_is_never_worse_than_none() -> None:
    """Weights that are exact in int4 lose by every scale."""
    codes = torch.randint(-8, 8, (16, 128), generator=torch.Generator().manual_seed(0)).float()
    codes[:, 0] = -8
    product = awq.Product("exact", codes, Coding("int4", 128), heavy(20, 128, 2))
    found = awq.search(
        lambda: [product], product.inputs.abs().mean(0), awq.weight_profile([product]), torch.clone
    )
    assert found.alpha is None
    assert found.error == 0
    assert (found.scale == 1).all()


@given(st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_a_norm_takes_the_scale_without_loss(seed: int) -> None:
    rng = np.random.default_rng(seed)
    stored = torch.from_numpy(rng.normal(0, 0.7, 64).astype(np.float32)).bfloat16().float()
    stored[:2] = torch.tensor([-1.0, -0.99609375])  # gamma of zero, and next to it
    wanted = torch.from_numpy(np.exp(rng.normal(0, 1, 64)).astype(np.float32))
    scale = awq.absorbed_by_norm(stored)(wanted)
    folded = (stored + 1) * (1 / scale) - 1
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    assert ((folded - folded.bfloat16().float()).abs() <= 1e-6 * (1 + folded.abs())).all()
    large = (stored + 1).abs() > 0.5
    moderate = large & (wanted < 4)
    assert ((scale / wanted - 1).abs()[moderate] < 0.05).all()
