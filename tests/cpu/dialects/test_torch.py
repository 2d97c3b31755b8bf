"""The torch dialect against transformers, and the proof that the comparison sees the model's rules."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from step35_trt.checkpoint import Checkpoint
from step35_trt.dialects.checkpoint_weights import CheckpointWeights
from step35_trt.dialects.torch import SequenceBatch, TorchOps
from step35_trt.evaluate import Evaluation, evaluate
from step35_trt.model import decoder
from step35_trt.rotary import inverse_frequencies
from step35_trt.runtime.session_torch import TorchSession
from tests.oracle import Oracle

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

LENGTH = 40  # five windows of one geometry, less than one of the other


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def expected(directory: Path, ids: np.ndarray) -> Evaluation:
    """The oracle's `Evaluation`."""
    oracle = Oracle.load(directory)
    logits, hidden = oracle.decode(ids)
    count = len(oracle.modules)
    mtp = np.full((count, *logits.shape), np.nan, np.float32)
    carried = hidden
    for k in range(count):
        rows = len(ids) - 1 - k
        mtp[k, :rows], carried = oracle.draft(k, ids[1 + k :], carried[:rows])
    return Evaluation(logits, hidden, mtp)


@pytest.fixture(scope="module")
def ids(checkpoint: Path) -> np.ndarray:
    vocabulary = Checkpoint.open(checkpoint).config.vocab_size
    return np.random.default_rng(1).integers(0, vocabulary, LENGTH)


def test_matches_transformers(checkpoint: Path, ids: np.ndarray) -> None:
    want = expected(checkpoint, ids)
    got = evaluate(TorchSession.of(Checkpoint.open(checkpoint)), ids)
    assert relative(got.logits, want.logits) < 1e-5
    assert relative(got.hidden, want.hidden) < 1e-5
    for k in range(3):
        rows = LENGTH - 1 - k
        assert relative(got.mtp_logits[k, :rows], want.mtp_logits[k, :rows]) < 1e-5
        assert np.isnan(got.mtp_logits[k, rows:]).all()


def test_the_weights_exercise_every_rule(
    checkpoint: Path, ids: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clamps are hit on both sides, the bias changes selections, frequencies lie in all three branches."""
    opened = Checkpoint.open(checkpoint)
    clamped: dict[str, set[float]] = {"gate": set(), "up": set()}
    changed = []
    swiglu, sparse_moe = TorchOps.swiglu, TorchOps.sparse_moe

    def spy_swiglu(self: TorchOps, gate: Tensor, up: Tensor, limit: float) -> Tensor:
        if limit:
            if (torch.nn.functional.silu(gate) > limit).any():
                clamped["gate"].add(limit)
            if (up > limit).any() and (up < -limit).any():
                clamped["up"].add(limit)
        return swiglu(self, gate, up, limit)

    def spy_moe(self: TorchOps, x: Tensor, selection: Tensor, weights: Tensor, *rest: object) -> Tensor:
        top = rest[1]
        with_bias = selection.topk(top).indices.sort().values
        changed.append((with_bias != weights.topk(top).indices.sort().values).any().item())
        return sparse_moe(self, x, selection, weights, *rest)

    monkeypatch.setattr(TorchOps, "swiglu", spy_swiglu)
    monkeypatch.setattr(TorchOps, "sparse_moe", spy_moe)
    evaluate(TorchSession.of(opened), ids)
    assert clamped == {"gate": {0.7, 1.6}, "up": {0.7, 1.6}}
    assert any(changed)
    layer = opened.config.layers[0]
    ratio = inverse_frequencies(replace(layer, rope_scaling=None)) / inverse_frequencies(layer)
    assert ratio[0] == 1
    assert ratio[-1] == 2
    assert ((ratio > 1.01) & (ratio < 1.99)).any()


def window_513(monkeypatch: pytest.MonkeyPatch) -> None:
    import step35_trt.dialects.torch as dialect

    attend = dialect.attend
    monkeypatch.setattr(
        dialect, "attend", lambda q, k, v, past, window: attend(q, k, v, past, window + 1 if window else 0)
    )


def missing_plus_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchOps, "plus_one", lambda _self, vector: vector)


def clamp_before_silu(monkeypatch: pytest.MonkeyPatch) -> None:
    silu = torch.nn.functional.silu

    def swiglu(_self: TorchOps, gate: Tensor, up: Tensor, limit: float) -> Tensor:
        return silu(gate.clamp(max=limit)) * up.clamp(-limit, limit) if limit else silu(gate) * up

    monkeypatch.setattr(TorchOps, "swiglu", swiglu)


def biased_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = TorchOps.sparse_moe
    monkeypatch.setattr(
        TorchOps,
        "sparse_moe",
        lambda self, x, selection, _weights, *rest: moe(self, x, selection, selection, *rest),
    )


@pytest.mark.parametrize("mistake", [window_513, missing_plus_one, clamp_before_silu, biased_weights])
def test_a_mistake_shows(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, mistake: object
) -> None:
    directory = checkpoints["small-window"]
    ids = np.random.default_rng(1).integers(0, 97, LENGTH)
    want = expected(directory, ids)
    assert callable(mistake)
    mistake(monkeypatch)
    got = evaluate(TorchSession.of(Checkpoint.open(directory)), ids)
    assert relative(got.hidden, want.hidden) > 1e-3


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_split_and_rollback(checkpoints: dict[str, Path], data: st.DataObject) -> None:
    directory = checkpoints["small-window"]
    ids = np.random.default_rng(2).integers(0, 97, LENGTH)
    session = TorchSession.of(Checkpoint.open(directory))
    want = evaluate(session, ids)
    sequence, done, parts = session.open(), 0, []
    while done < LENGTH:
        size = data.draw(st.integers(1, LENGTH - done))
        junk = data.draw(st.lists(st.integers(0, 96), max_size=4))
        part = np.array([*ids[done : done + size], *junk])
        parts.append(sequence.decode(part, np.arange(size)).logits)
        done += size
        sequence.truncate(done)
    assert relative(np.concatenate(parts), want.logits) < 1e-5


def test_packed_sequences_do_not_meet(checkpoint: Path) -> None:
    opened = Checkpoint.open(checkpoint)
    weights = CheckpointWeights(opened)
    rng = np.random.default_rng(3)
    parts = [torch.from_numpy(rng.integers(0, opened.config.vocab_size, n)) for n in (5, 1, 17)]

    def run(*some: Tensor) -> Tensor:
        ops = TorchOps(weights, SequenceBatch.fresh(*map(len, some)))
        ids = torch.cat(some)
        return decoder(ops, opened.config, ids, torch.arange(len(ids)))[0]

    with torch.inference_mode():
        together, alone = run(*parts), torch.cat([run(part) for part in parts])
    assert relative(together.numpy(), alone.numpy()) < 1e-5


def test_bf16_keeps_its_fp32_islands(
    checkpoint: Path, ids: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Specification 2.12: router logits, scores and norms' insides; bf16 elsewhere, near the fp32 result."""
    opened = Checkpoint.open(checkpoint)
    seen = []
    moe = TorchOps.sparse_moe

    def spy(self: TorchOps, x: Tensor, selection: Tensor, weights: Tensor, *rest: object) -> Tensor:
        seen.append((x.dtype, selection.dtype, weights.dtype))
        return moe(self, x, selection, weights, *rest)

    monkeypatch.setattr(TorchOps, "sparse_moe", spy)
    session = TorchSession.of(opened, torch.bfloat16)
    got = evaluate(session, ids)
    assert set(seen) == {(torch.bfloat16, torch.float32, torch.float32)}
    want = evaluate(TorchSession.of(opened), ids)
    assert 1e-5 < relative(got.hidden[:1], want.hidden[:1]) < 0.1
