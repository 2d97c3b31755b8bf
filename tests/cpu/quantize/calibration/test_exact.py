"""Before anything is rounded, a folded model computes what the original does; with one part missing, not."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from step35_trt.checkpoint import Checkpoint
from step35_trt.dialects.checkpoint_weights import CheckpointWeights
from step35_trt.evaluate import Evaluation, evaluate
from step35_trt.quantize.calibration import awq, calibrate
from step35_trt.quantize.folding import Folded, Folding, Scaling
from step35_trt.resources import NANO
from step35_trt.runtime.session_torch import TorchSession
from tests.synthetic import raw_config, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from step35_trt.quantize.recipe import Recipe

LENGTH = 30
FP32, BROKEN = 1e-5, 1e-3


def run(source: Any, ids: np.ndarray, dtype: torch.dtype = torch.float32) -> Evaluation:
    return evaluate(TorchSession(source.config, CheckpointWeights(source, dtype)), ids)


def apart(got: Evaluation, want: Evaluation) -> float:
    """The largest difference of logits, hidden states and the modules' logits, relative."""
    pairs = [(got.logits, want.logits), (got.hidden, want.hidden)]
    for k in range(len(want.mtp_logits)):
        rows = LENGTH - 1 - k
        pairs.append((got.mtp_logits[k, :rows], want.mtp_logits[k, :rows]))
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def strong(seed: int) -> Callable[..., awq.Choice]:
    """In the place of the search: large random scales, as far as the model takes them."""
    generator = torch.Generator().manual_seed(seed)

    def choose(
        _products: awq.Products,
        mean: Tensor,
        _profile: Tensor,
        absorb: Callable[[Tensor], Tensor],
        _alphas: tuple[float, ...] = (),
    ) -> awq.Choice:
        scale = absorb(torch.exp(torch.randn(mean.shape, generator=generator)))
        return awq.Choice(0.5, scale, 0.0, 0.0)

    return choose


def strongly_folded(directory: Path, work: Path, recipe: Recipe, seed: int = 0) -> Folding:
    """Every scale that the model takes, large; no clips."""
    source = Checkpoint.open(directory)
    ids = np.random.default_rng(seed).integers(0, source.config.vocab_size, (2, 16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(awq, "search", strong(seed))
        found = calibrate(source, recipe, ids, work, min_expert_tokens=0)
    return without_clips(found.folding)


def without_clips(folding: Folding) -> Folding:
    scalings = {name: replace(s, clip=None) for name, s in folding.scalings.items()}
    return Folding({n: s for n, s in scalings.items() if s.rows is not None or s.columns is not None})


@pytest.fixture(scope="module")
def int4_heads(int4: Recipe) -> Recipe:
    """int4 in the heads too, so that their norms are scaled as well."""
    return int4.model_copy(update={"rules": tuple(r for r in int4.rules if r.precision != "fp8-rows")})


@pytest.fixture(scope="module")
def folding(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, int4_heads: Recipe) -> Folding:
    return strongly_folded(checkpoint, tmp_path_factory.mktemp("work"), int4_heads)


@pytest.fixture(scope="module")
def ids(checkpoint: Path) -> np.ndarray:
    return np.random.default_rng(1).integers(0, Checkpoint.open(checkpoint).config.vocab_size, LENGTH)


@pytest.fixture(scope="module")
def original(checkpoint: Path, ids: np.ndarray) -> Evaluation:
    return run(Checkpoint.open(checkpoint), ids)


def test_equals_the_original_in_fp32(
    checkpoint: Path, folding: Folding, ids: np.ndarray, original: Evaluation
) -> None:
    source = Checkpoint.open(checkpoint)
    # Large scales make large sums: fp32 loses what the scale gains.
    assert apart(run(Folded(source, folding), ids), original) < 3 * FP32
    names = [name for name in source.tensors if not name.endswith(("q_norm.weight", "k_norm.weight"))]
    untouched = {name for name in names if name not in folding.scalings}
    limits = {layer.prefix: layer for layer in (*source.config.layers, *source.config.mtp_layers)}
    assert untouched == {"model.embed_tokens.weight"} | {n for n in names if n.endswith("router_bias")} | {
        name
        for prefix, layer in limits.items()
        for name in (f"{prefix}.moe.down_proj.weight", f"{prefix}.share_expert.down_proj.weight")
        if name in names and (layer.routed_limit if ".moe." in name else layer.shared_limit)
    }


def test_equals_the_original_in_bf16(
    checkpoint: Path, folding: Folding, ids: np.ndarray, original: Evaluation
) -> None:
    """With weights and activations in bf16 the folded model is as near to fp32 as the original is."""
    source = Checkpoint.open(checkpoint)

    def mean_error(got: Evaluation) -> float:
        return float(np.abs(got.logits - original.logits).mean())

    plain = mean_error(run(source, ids, torch.bfloat16))
    assert mean_error(run(Folded(source, folding), ids, torch.bfloat16)) < 2 * plain


def test_norms_are_bf16_numbers(checkpoint: Path, folding: Folding) -> None:
    source = Checkpoint.open(checkpoint)
    norms = [name for name in folding.scalings if name.endswith("norm.weight")]
    assert len(norms) == 2 * (len(source.config.layers) + 3) + 1 + 3 * 3
    for name in norms:
        values = torch.from_numpy(Folded(source, folding).read(name))
        lost = (values - values.bfloat16().float()).abs()
        assert (lost <= 1e-6 * (1 + values.abs())).all(), name


@pytest.mark.parametrize(
    "part",
    [
        "layers.3.moe.gate.weight",
        "layers.3.moe.gate_proj.weight",
        "layers.3.moe.down_proj.weight",
        "layers.3.share_expert.up_proj.weight",
        "layers.1.self_attn.g_proj.weight",
        "layers.1.self_attn.k_proj.weight",
        "layers.1.self_attn.o_proj.weight",
        "layers.1.input_layernorm.weight",
        "layers.1.mlp.up_proj.weight",
        "lm_head.weight",
        "{mtp}.eh_proj.weight",
        "{mtp}.hnorm.weight",
        "{mtp}.transformer.shared_head.output.weight",
    ],
)
def test_every_compensation_is_needed(
    checkpoint: Path, folding: Folding, ids: np.ndarray, original: Evaluation, part: str
) -> None:
    source = Checkpoint.open(checkpoint)
    suffix = part.format(mtp=f"layers.{source.config.mtp_layers[0].index}")
    if suffix.endswith("moe.down_proj.weight") and source.config.layers[3].routed_limit:
        pytest.skip("a clamp lies before it")
    [name] = [name for name in folding.scalings if name.endswith(suffix)]
    without = {key: value for key, value in folding.scalings.items() if key != name}
    assert apart(run(Folded(source, Folding(without)), ids), original) > BROKEN


def test_the_plus_one_of_norms_is_needed(
    checkpoint: Path, folding: Folding, ids: np.ndarray, original: Evaluation
) -> None:
    """A norm's stored weight multiplied as if it were gamma."""
    source = Checkpoint.open(checkpoint)
    name = "model.layers.2.input_layernorm.weight"
    stored, rows = source.read(name), folding.scalings[name].rows
    assert rows is not None
    wrong = (stored * rows + 1) / (stored + 1)
    scalings = {**folding.scalings, name: Scaling(rows=wrong.astype(np.float32))}
    assert apart(run(Folded(source, Folding(scalings)), ids), original) > BROKEN


@pytest.mark.parametrize("where", ["moe", "share_expert"])
def test_a_clamp_between_up_and_down_takes_no_scale(
    checkpoint: Path, folding: Folding, ids: np.ndarray, original: Evaluation, where: str
) -> None:
    source = Checkpoint.open(checkpoint)
    layer = source.config.layers[-1]
    assert layer.routed_limit
    assert layer.shared_limit
    up, down = (f"{layer.prefix}.{where}.{part}_proj.weight" for part in ("up", "down"))
    assert folding.scalings[up].rows is None
    assert down not in folding.scalings
    # Had it been folded all the same:
    factor = np.full(source.shape(up)[:-1], 2, np.float32)
    wrong = {up: replace(folding.scalings[up], rows=1 / factor), down: Scaling(columns=factor)}
    assert apart(run(Folded(source, Folding({**folding.scalings, **wrong})), ids), original) > BROKEN


def test_query_heads_of_a_group_share_their_scale(checkpoint: Path, folding: Folding) -> None:
    for layer in Checkpoint.open(checkpoint).config.layers:
        columns = folding.scalings[f"{layer.prefix}.self_attn.o_proj.weight"].columns
        rows = folding.scalings[f"{layer.prefix}.self_attn.v_proj.weight"].rows
        assert columns is not None
        assert rows is not None
        by_group = columns.reshape(layer.kv_heads, -1, layer.head_dim)
        assert (by_group == by_group[:, :1]).all()
        np.testing.assert_allclose(by_group[:, 0] * rows.reshape(layer.kv_heads, -1), 1, rtol=1e-6)


geometries = st.fixed_dictionaries(
    {
        "layers": st.integers(2, 4),
        "modules": st.integers(0, 2),
        "heads": st.sampled_from([(4, 6), (8, 12), (2, 2)]),
        "groups": st.sampled_from([1, 2]),
        "head_dim": st.sampled_from([16, 32]),
        "hidden_size": st.sampled_from([32, 48, 80]),
        "intermediate_size": st.sampled_from([32, 48]),
        "moe_num_experts": st.integers(3, 9),
        "moe_intermediate_size": st.sampled_from([16, 32]),
        "share_expert_dim": st.sampled_from([16, 48]),
    }
)


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=geometries,
    limits=st.tuples(st.sampled_from([0, 0.7]), st.sampled_from([0, 1.6])),
    seed=st.integers(0, 99),
)
def test_any_geometry(
    tmp_path_factory: pytest.TempPathFactory,
    int4_heads: Recipe,
    changes: dict[str, Any],
    limits: tuple[float, float],
    seed: int,
) -> None:
    total = changes["layers"] + changes["modules"]
    routed, shared = ([limit] * total for limit in limits)
    root = tmp_path_factory.mktemp("geometry")
    raw = raw_config(**changes, swiglu_limits=routed, swiglu_limits_shared=shared)
    directory = write_checkpoint(root / "checkpoint", raw, seed)
    source = Checkpoint.open(directory)
    folding = strongly_folded(directory, root / "work", int4_heads, seed)
    ids = np.random.default_rng(seed).integers(0, 97, LENGTH)
    assert apart(run(Folded(source, folding), ids), run(source, ids)) < 5 * FP32


def test_nano_calibrated(tmp_path: Path, int4: Recipe) -> None:
    """The scales that the search finds on nano."""
    source = Checkpoint.open(NANO)
    ids = np.random.default_rng(0).integers(0, source.config.vocab_size, (2, 48))
    found = calibrate(source, int4, ids, tmp_path, min_expert_tokens=4)
    folding = without_clips(found.folding)
    assert len(folding.scalings) > 60
    ids = np.random.default_rng(1).integers(0, source.config.vocab_size, LENGTH)
    want = run(source, ids)
    assert apart(run(Folded(source, folding), ids), want) < FP32
    broken = {n: s for n, s in folding.scalings.items() if n != "model.layers.4.moe.gate.weight"}
    assert "model.layers.4.moe.gate.weight" not in folding.scalings or (
        apart(run(Folded(source, Folding(broken)), ids), want) > 10 * FP32
    )
