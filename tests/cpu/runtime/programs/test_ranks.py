"""Processes that share a model give what one gives: every way to share it, with and without drafts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from step35_trt.checkpoint import Checkpoint
from step35_trt.evaluate import evaluate
from step35_trt.resources import NANO
from step35_trt.runtime.load import open_bundle
from step35_trt.runtime.session_program import ProgramSession
from step35_trt.runtime.session_torch import TorchSession
from tests.rank_stories import BOTH, EXPERT, NAMES, WAYS, answer, compare, see_of, tell_of
from tests.ranks import run_ranks, shareable, shared_bundle

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from step35_trt.runtime.programs.program_weights import ProgramWeights

pytestmark = pytest.mark.early

TOKENS = 6
PROMPT = np.random.default_rng(0).integers(6, 96, 19).tolist()


@pytest.fixture(scope="module")
def divisible(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shareable(tmp_path_factory.mktemp("shared") / "checkpoint")


def alone(checkpoint: Path, prompt: list[int], out: Path) -> Path:
    """What the definition answers."""
    answer(TorchSession.of(Checkpoint.open(checkpoint)), prompt, TOKENS, out)
    return out


@pytest.fixture(scope="module")
def expected(divisible: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return alone(divisible, PROMPT, tmp_path_factory.mktemp("expected"))


@pytest.mark.parametrize(("ranks", "ways"), WAYS, ids=NAMES)
def test_ranks_say_what_one_says(
    divisible: Path, expected: Path, tmp_path: Path, ranks: int, ways: dict[str, str]
) -> None:
    bundle = shared_bundle(divisible, tmp_path / "bundle", ranks, **ways)
    assert run_ranks(ranks, tell_of, bundle, PROMPT, TOKENS, tmp_path) == [0] * ranks
    compare(expected, tmp_path, TOKENS)


def test_nano(tmp_path: Path) -> None:
    bundle = shared_bundle(NANO, tmp_path / "bundle", 2, **BOTH)
    prompt = np.random.default_rng(0).integers(6, 1000, 12).tolist()
    assert run_ranks(2, tell_of, bundle, prompt, TOKENS, tmp_path) == [0, 0]
    compare(alone(NANO, prompt, tmp_path / "alone"), tmp_path, TOKENS)


def test_ranks_in_bf16(tmp_path: Path) -> None:
    """Sums of rounded summands are as near to exact arithmetic; a long prompt's order comes in two pieces."""
    prompt = np.random.default_rng(0).integers(6, 1000, 150).tolist()
    alone = open_bundle(shared_bundle(NANO, tmp_path / "alone", 1, "int4-awq", 200))
    assert isinstance(alone, ProgramSession)
    exact = TorchSession(alone.config, Widened(alone.runner.executor.weights))
    want, truth = (evaluate(session, np.array(prompt)) for session in (alone, exact))
    bundle = shared_bundle(NANO, tmp_path / "bundle", 2, "int4-awq", 200, **EXPERT)
    assert run_ranks(2, see_of, bundle, prompt, tmp_path) == [0, 0]
    got = np.load(tmp_path / "seen.npz")
    for name, one, right in (
        ("logits", want.logits, truth.logits),
        ("mtp", want.mtp_logits, truth.mtp_logits),
    ):
        rows = ~np.isnan(right).any(-1)
        ours, theirs = (np.linalg.norm(x[rows] - right[rows]) for x in (got[name], one))
        assert 1e-4 < theirs / np.linalg.norm(right[rows]) < 0.05
        assert ours < 1.3 * theirs


class Widened:
    """The same weights, decoded and rounded, computed with in fp32."""

    def __init__(self, weights: ProgramWeights) -> None:
        self.weights = weights

    def tensor(self, name: str) -> Tensor:
        return self.weights.tensor(name).float()

    def expert(self, name: str, index: int) -> Tensor:
        expert = self.weights.expert(name, index)
        assert expert is not None
        return expert.float()
