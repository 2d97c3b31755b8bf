"""Ranks that share a model: what they exchange, what each holds, and that together they compute the model."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pytest

from step35_trt.checkpoint import Checkpoint
from step35_trt.config import Step35Config
from step35_trt.evaluate import Evaluation, evaluate
from step35_trt.interpret.session import InterpretedSession
from step35_trt.lower import ModelPrograms
from step35_trt.resources import PUBLISHED
from step35_trt.runtime.session_torch import TorchSession
from step35_trt.sharing import Part, Sharing, Way
from tests.forms import forms
from tests.synthetic import raw_config, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from step35_trt.interpret.network import Array
    from step35_trt.steps import CollectiveStep

EVERYTHING: dict[Part, Way] = {
    "attention": "tensor",
    "routed experts": "expert",
    "shared expert": "tensor",
    "dense MLP": "tensor",
    "head": "tensor",
}
FULL = Step35Config.load(PUBLISHED)


@dataclass
class Meeting:
    """Where the threads of all ranks exchange what they have."""

    ranks: int
    brought: dict[int, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.ranks, timeout=60)

    def exchange(self, rank: int, step: CollectiveStep, value: Array) -> Array:
        self.brought[rank] = value.copy()
        self.barrier.wait()
        parts = [self.brought[r].astype(np.float32) for r in range(self.ranks)]
        self.barrier.wait()  # nobody brings the next before all have taken this
        whole = np.sum(parts, 0) if step.operation == "all_reduce" else np.concatenate(parts, -1)
        return whole.astype(value.dtype)


def together(directory: Path, recipe: str, sharing: Sharing, ids: np.ndarray) -> list[Evaluation]:
    """What every rank ends up with."""
    meeting = Meeting(sharing.ranks)
    found: dict[int, Evaluation] = {}

    def work(rank: int) -> None:
        checkpoint = Checkpoint.open(directory)
        session = InterpretedSession.of(
            checkpoint,
            forms(checkpoint.config, recipe),
            sharing,
            rank,
            lambda step, value: meeting.exchange(rank, step, value),
        )
        try:
            found[rank] = evaluate(session, ids)
        except BaseException:
            meeting.barrier.abort()
            raise

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(sharing.ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(sharing.ranks)]


@pytest.fixture(scope="module")
def divisible(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = raw_config(groups=2, vocab_size=96, layers=5, hidden_size=128, share_expert_dim=64)
    return write_checkpoint(tmp_path_factory.mktemp("shared") / "checkpoint", raw)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.nanmax(np.abs(a - b)) / np.nanmax(np.abs(b)))


@pytest.mark.parametrize(
    "ways",
    [
        EVERYTHING,
        EVERYTHING | {"routed experts": "tensor"},
        {"routed experts": "expert"},
        {"attention": "tensor", "head": "tensor"},
    ],
    ids=["everything", "experts-cut", "experts", "attention"],
)
def test_two_ranks_compute_the_model(divisible: Path, ways: dict[Part, Way]) -> None:
    ids = np.random.default_rng(0).integers(0, 96, 20)
    want = evaluate(TorchSession.of(Checkpoint.open(divisible)), ids)
    for got in together(divisible, "fp32", Sharing(2, ways), ids):
        assert relative(got.logits, want.logits) < 1e-5
        assert relative(got.hidden, want.hidden) < 1e-5
        assert relative(got.mtp_logits, want.mtp_logits) < 1e-5


def test_a_rank_holds_its_share() -> None:
    """Experts and what is cut, once over all ranks; the rest on each."""
    whole, share = (
        ModelPrograms.of(FULL, forms(FULL, "fp8"), sharing) for sharing in (Sharing(), Sharing(2, EVERYTHING))
    )

    def weights(made: ModelPrograms) -> tuple[int, int]:
        costs = [step.cost for step in made.decoder.steps]
        return sum(c.weight_bytes for c in costs), sum(c.expert_bytes * c.experts for c in costs)

    dense, experts = weights(whole)
    dense_share, experts_share = weights(share)
    assert experts_share * 2 == experts
    replicated = dense_share * 2 - dense
    assert 0 < replicated < 0.05 * dense


def test_nothing_is_exchanged_twice() -> None:
    """Two sums a layer, one for attention and one for all experts together; logits are put side by side."""
    made = ModelPrograms.of(FULL, forms(FULL, "fp8"), Sharing(2, EVERYTHING))
    operations = Counter(step.operation for step in made.decoder.steps if step.kind == "collective")
    assert operations == {"all_reduce": 2 * 45, "all_gather": 1}
    alone = ModelPrograms.of(FULL, forms(FULL, "fp8"))
    assert not any(step.kind == "collective" for program in alone.programs for step in program.steps)
