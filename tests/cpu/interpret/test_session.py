"""Whole programs on the CPU, chained as a machine would run them, against the torch dialect."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from step35_trt.evaluate import evaluate
from step35_trt.resources import NANO
from step35_trt.runtime.session_torch import TorchSession
from tests.forms import interpreted
from tests.synthetic import raw_config, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from step35_trt.interpret.session import InterpretedSession
    from step35_trt.runtime.session import Sequence, Step


def reference(session: InterpretedSession) -> TorchSession:
    """The definition with the very weights that the programs are bound to."""
    return TorchSession(session.config, session.executor.weights)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def close(got: Step, want: Step, limit: float) -> None:
    assert relative(got.logits, want.logits) < limit
    assert relative(got.hidden, want.hidden) < limit


def test_decoder_and_modules_in_fp32(checkpoint: Path) -> None:
    session = interpreted(checkpoint, "fp32")
    ids = np.random.default_rng(0).integers(0, session.config.vocab_size, 40)
    got, want = evaluate(session, ids), evaluate(reference(session), ids)
    assert relative(got.logits, want.logits) < 1e-5
    assert relative(got.hidden, want.hidden) < 1e-5
    for k in range(3):
        assert relative(got.mtp_logits[k, : 39 - k], want.mtp_logits[k, : 39 - k]) < 1e-5


def test_nano_in_fp32() -> None:
    session = interpreted(NANO, "fp32")
    ids = np.random.default_rng(0).integers(0, session.config.vocab_size, 96)
    got, want = evaluate(session, ids), evaluate(reference(session), ids)
    assert relative(got.logits, want.logits) < 1e-5
    assert relative(got.mtp_logits[:, :93], want.mtp_logits[:, :93]) < 1e-5


@pytest.mark.parametrize("recipe", ["bf16", "int4-awq", "fp8"])
def test_bf16_is_as_far_from_the_truth_as_the_definition_is(recipe: str) -> None:
    """Two bf16 computations drift apart by rounding; both stay as near to fp32 with the same weights."""
    session = interpreted(NANO, recipe)
    ids = np.random.default_rng(0).integers(0, session.config.vocab_size, 96)
    exact = TorchSession(session.config, Widened(session))
    truth = evaluate(exact, ids).logits
    ours, theirs = (
        np.linalg.norm(evaluate(run, ids).logits - truth) / np.linalg.norm(truth)
        for run in (session, reference(session))
    )
    assert 1e-4 < theirs < 0.05
    assert ours < 1.3 * theirs


class Widened:
    """The programs' weights, decoded and rounded as they are, in fp32."""

    def __init__(self, session: InterpretedSession) -> None:
        self.weights = session.executor.weights

    def tensor(self, name: str):  # type: ignore[no-untyped-def]
        return self.weights.tensor(name).float()

    def expert(self, name: str, index: int):  # type: ignore[no-untyped-def]
        return self.weights.expert(name, index).float()


def rounds(sequence: Sequence, vocabulary: int, seed: int, prompt: int, kept: list[int]) -> list[Step]:
    """A prompt in two chunks, then verified drafts of which some are kept, and each module beside it."""
    rng = np.random.default_rng(seed)
    steps = []
    cut = prompt // 3
    for size in (cut, prompt - cut):
        if size:
            steps.append(sequence.decode(rng.integers(0, vocabulary, size), np.array([size - 1])))
    for keep in kept:
        start = sequence.length
        steps.append(sequence.decode(rng.integers(0, vocabulary, 4), np.arange(4)))
        sequence.truncate(start + keep)
        module = int(rng.integers(0, 3))
        rows = sequence.draft_length(module)
        hidden = steps[-1].hidden[:keep]
        steps.append(sequence.draft(module, rng.integers(0, vocabulary, keep), hidden, np.array([keep - 1])))
        sequence.truncate_draft(module, rows + max(1, keep - 1))
    return steps


@given(
    heads=st.sampled_from([(8, 12), (4, 6), (16, 8)]),
    groups=st.sampled_from([1, 2]),
    head_dim=st.sampled_from([8, 16, 32]),
    window=st.integers(1, 20),
    layers=st.integers(2, 5),
    hidden=st.sampled_from([32, 48, 64]),
    experts=st.integers(3, 12),
    prompt=st.integers(1, 24),
    kept=st.lists(st.integers(1, 4), max_size=4),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_geometries_with_rollbacks(
    tmp_path_factory: pytest.TempPathFactory,
    heads: tuple[int, int],
    groups: int,
    head_dim: int,
    window: int,
    layers: int,
    hidden: int,
    experts: int,
    prompt: int,
    kept: list[int],
    seed: int,
) -> None:
    raw = raw_config(
        heads=heads,
        groups=groups,
        head_dim=head_dim,
        sliding_window=window,
        layers=layers,
        hidden_size=hidden,
        moe_num_experts=experts,
        vocab_size=53,
    )
    directory = write_checkpoint(tmp_path_factory.mktemp("geometry"), raw, seed)
    session = interpreted(directory, "fp32")
    ours, theirs = (rounds(run.open(), 53, seed, prompt, kept) for run in (session, reference(session)))
    for got, want in zip(ours, theirs, strict=True):
        close(got, want, 3e-5)


def test_a_rejected_draft_leaves_nothing(checkpoints: dict[str, Path]) -> None:
    session = interpreted(checkpoints["small-window"], "bf16")
    ids = np.random.default_rng(0).integers(0, 97, 30)
    spoiled, clean = session.open(), session.open()
    for sequence in (spoiled, clean):
        sequence.decode(ids[:20], np.array([19]))
    spoiled.decode(np.array([1, 2, 3, 4]), np.arange(4))
    spoiled.truncate(20)
    a, b = (sequence.decode(ids[20:24], np.arange(4)) for sequence in (spoiled, clean))
    np.testing.assert_array_equal(a.logits, b.logits)
    assert spoiled.length == clean.length == 24
