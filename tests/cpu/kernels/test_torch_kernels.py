"""The torch dialect with its plugins as kernels, in Triton's interpreter, against its own definition."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import pytest
import torch

from step35_trt.checkpoint import EXPERT_PROJECTIONS, Checkpoint
from step35_trt.dialects.checkpoint_weights import CheckpointWeights
from step35_trt.dialects.torch import LayerCache, SequenceBatch, TorchOps
from step35_trt.dialects.torch_experts import checkpoint_experts
from step35_trt.dialects.torch_kernels import TritonKernels, present_target
from step35_trt.errors import UnsupportedError
from step35_trt.kernels import plugin
from step35_trt.kernels.targets import TARGETS
from step35_trt.quantize.convert import conversion_key, convert
from step35_trt.quantize.recipe import Recipe, Rule
from step35_trt.runtime.session_torch import TorchSession
from tests.cpu.plugins.gated_attention.cases import EPS, layer
from tests.synthetic import raw_config, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from step35_trt.config import LayerSpec

HOPPER = TARGETS["sm_90"]
PAGE = plugin.load("gated_attention", "geometry").PAGE
PREFIX = "model.layers.1.moe"
FORMATS = {"bf16": "bf16", "fp8-rows": "fp8_channel", "fp8-blocks": "fp8_block", "int4": "int4"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """One layer of each kind, experts as wide as their blocks allow, in every precision of experts."""
    root = tmp_path_factory.mktemp("kernels")
    widths = {"hidden_size": 256, "moe_intermediate_size": 128, "moe_num_experts": 5}
    raw = raw_config(layers=2, modules=1, moe_layers_enum="1", **widths)
    source = Checkpoint.open(write_checkpoint(root / "bf16", raw))
    found = {"bf16": source}
    for precision in FORMATS.keys() - {"bf16"}:
        rules = [("*.moe.*_proj.weight", precision), ("*", "bf16")]
        recipe = Recipe(
            name=precision,
            summary="",
            max_mean_kl=1,
            rules=tuple(Rule.model_validate({"weights": w, "precision": p}) for w, p in rules),
        )
        convert(source, root / precision, recipe, conversion_key(source, recipe))
        found[precision] = Checkpoint.open(root / precision)
    return found


@pytest.mark.parametrize("precision", FORMATS)
def test_experts_are_the_checkpoints_own_codes(checkpoints: dict[str, Checkpoint], precision: str) -> None:
    checkpoint = checkpoints[precision]
    found = checkpoint_experts(checkpoint, PREFIX, "cpu")
    assert found.format == FORMATS[precision]
    for part, matrix in zip(
        EXPERT_PROJECTIONS, (found.weights.gate, found.weights.up, found.weights.down), strict=True
    ):
        name = f"{PREFIX}.{part}.weight"
        for expert in range(5):
            np.testing.assert_array_equal(
                matrix.expert(found.format, expert).numpy(), checkpoint.read(name, expert)
            )


@pytest.mark.parametrize("precision", FORMATS)
def test_experts_compute_what_the_definition_does(checkpoints: dict[str, Checkpoint], precision: str) -> None:
    weights = CheckpointWeights(checkpoints[precision])
    generator = torch.Generator().manual_seed(0)
    x, scores = torch.randn(2, 256, generator=generator), torch.rand(2, 5, generator=generator)
    got, want = (
        TorchOps(weights, SequenceBatch.fresh(2), kernels).sparse_moe(x, scores, scores, PREFIX, 2, 3.0, 0.7)
        for kernels in (TritonKernels(weights, HOPPER), None)
    )
    error = (got - want).abs().max() / want.abs().max()
    assert 0 < error < 0.01  # activations round to bf16


def run(session: TorchSession) -> dict[str, np.ndarray]:
    """Prefill, drafts that are rejected, one that stays; and an MTP module."""
    ids = np.random.default_rng(1).integers(0, 97, 12)
    sequence = session.open()
    found = [sequence.decode(ids[:9], np.arange(9))]
    sequence.decode(np.array([3, 5, 7]), np.arange(0))
    sequence.truncate(9)
    found.append(sequence.decode(ids[9:11], np.arange(2)))
    draft = sequence.draft(0, ids[1:4], found[0].hidden[:3], np.arange(3))
    return {"decoder": np.concatenate([step.hidden for step in found]), "draft": draft.hidden}


def test_a_model_computes_what_the_definition_does(tmp_path: Path) -> None:
    raw = raw_config(layers=2, modules=1, moe_layers_enum="1")
    plain = TorchSession.of(Checkpoint.open(write_checkpoint(tmp_path / "checkpoint", raw)))
    want = run(plain)
    got = run(replace(plain, kernels=TritonKernels(plain.weights, HOPPER)))
    for name, value in want.items():
        error = np.abs(got[name] - value).max() / np.abs(value).max()
        assert 0 < error < 0.02, name  # experts round to bf16


def test_weights_without_codes_become_bf16(checkpoints: dict[str, Checkpoint]) -> None:
    class Numbers:
        def tensor(self, name: str) -> torch.Tensor:
            return torch.from_numpy(checkpoints["int4"].read(name))

    found = TritonKernels(Numbers(), HOPPER)._found(PREFIX)
    assert found.format == "bf16"
    want = checkpoints["int4"].read(f"{PREFIX}.up_proj.weight", 3).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(found.weights.up.expert("bf16", 3).numpy(), want.astype(np.float32))


class Attention:
    """Sequences whose every step is computed by the kernels and by the definition."""

    def __init__(self, spec: LayerSpec, kernels: TritonKernels) -> None:
        self.spec, self.kernels, self.generator = spec, kernels, torch.Generator().manual_seed(0)
        self.pasts: list[int] = []
        self.kept: list[dict] = []
        self.defined: list[dict] = []

    def open(self, past: int) -> None:
        """A sequence that has `past` rows already."""
        spec = self.spec
        history = torch.randn(2, past, spec.kv_heads, spec.head_dim, generator=self.generator)
        pool = self.kernels._pool(spec, PAGE, self.kernels.kv_dtype or torch.float32, history.device)
        rows = pool.open()
        rows.reserve(0, past)
        for place, page in enumerate(rows.pages):
            keys, values = history[:, place * PAGE : (place + 1) * PAGE].transpose(1, 2)
            pool.keys[page, :, : keys.shape[1]] = keys.to(pool.keys.dtype)
            pool.values[page, :, : keys.shape[1]] = values.to(pool.keys.dtype)
        self.pasts.append(past)
        self.kept.append({spec.index: rows})
        self.defined.append({spec.index: LayerCache(history[0], history[1])})

    def step(self, *lengths: int, rejected: int = 0) -> float:
        """Largest difference, where values are about 1; then the last rows of all are taken back."""
        spec, t = self.spec, sum(lengths)
        shapes = [spec.query_heads * spec.head_dim, *2 * [spec.kv_heads * spec.head_dim], spec.query_heads]
        packed = [torch.randn(t, width, generator=self.generator) for width in shapes]
        gammas = 0.5 + torch.rand(2, spec.head_dim, generator=self.generator)
        results = []
        for caches, kernels in ((self.kept, self.kernels), (self.defined, None)):
            batch = SequenceBatch(lengths, tuple(self.pasts), tuple(caches))
            ops = TorchOps(None, batch, kernels)
            results.append(ops.gated_attention(*packed, gammas[0], gammas[1], EPS, spec))
        for s, length in enumerate(lengths):
            self.pasts[s] += max(length - rejected, 0)
            for caches in (self.kept[s], self.defined[s]):
                caches[spec.index].truncate(self.pasts[s])
        return (results[0] - results[1]).abs().max().item()


@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize(
    ("kv_dtype", "tolerance"), [(None, 2e-5), (torch.float8_e4m3fn, 0.2)], ids=["fp32", "e4m3"]
)
def test_sequences_share_launches_and_pages(
    window: int, kv_dtype: torch.dtype | None, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, calls = plugin.load("gated_attention", "launch"), []
    original = launch.gated_attention
    monkeypatch.setattr(launch, "gated_attention", lambda *arguments: calls.append(1) or original(*arguments))
    kernels = TritonKernels(None, HOPPER, kv_dtype)
    both = Attention(layer(8, 1, 16, window, 8), kernels)
    both.open(126)
    both.open(0)
    errors = [both.step(7, 2), both.step(4, 0, rejected=2)]
    both.open(260)
    errors += [both.step(3, 2, 1, rejected=1), both.step(1, 1, 1)]
    assert len(calls) == len(errors)
    assert max(errors) < tolerance
    assert kv_dtype is None or max(errors) > 1e-4
    [pool] = kernels._pools.values()
    assert pool.keys.dtype == (kv_dtype or torch.float32)
    held = [len(caches[0].pages) for caches in both.kept]
    assert held == ([1, 1, 2] if window else [2, 1, 3])
    del both
    assert len(pool.free) == len(pool.keys)


def test_nothing_is_kept_where_nothing_is_asked_to_be() -> None:
    kernels, spec = TritonKernels(None, HOPPER), layer(8, 1, 16, 0, 8)
    packed = [torch.randn(3, width) for width in (128, 16, 16, 8)]
    gammas = torch.ones(2, 16)
    batch = SequenceBatch.fresh(2, 1)
    got, want = (
        TorchOps(None, batch, k).gated_attention(*packed, gammas[0], gammas[1], EPS, spec)
        for k in (kernels, None)
    )
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    [pool] = kernels._pools.values()
    assert len(pool.free) == len(pool.keys)


def test_a_device_that_is_not_here_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no CUDA device"):
        present_target(torch.device("cpu"))
