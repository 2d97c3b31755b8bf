"""Processes that share a model give what one gives: every way to share it, with and without drafts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from step35_trt.checkpoint import Checkpoint
from step35_trt.evaluate import evaluate
from step35_trt.resources import NANO
from step35_trt.runtime.generate import generate
from step35_trt.runtime.load import open_bundle
from step35_trt.runtime.sampling import SamplingParams
from step35_trt.runtime.session import Call
from step35_trt.runtime.session_program import ProgramSession
from step35_trt.runtime.session_torch import TorchSession
from tests.ranks import run_ranks, shared_bundle
from tests.synthetic import raw_config, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from step35_trt.runtime.program_weights import ProgramWeights
    from step35_trt.runtime.session import Session

TENSOR = {"attention": "tensor", "experts": "tensor", "mlp": "tensor", "head": "tensor"}
EXPERT = {"experts": "expert"}
BOTH = {"attention": "tensor", "experts": "expert", "mlp": "tensor", "head": "tensor"}
GREEDY = SamplingParams(0.0, 1.0, 0, 0.0, None)


@pytest.fixture(scope="module")
def divisible(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads, experts and widths that four ranks can share."""
    raw = raw_config(groups=4, vocab_size=96, layers=5)
    return write_checkpoint(tmp_path_factory.mktemp("shared") / "checkpoint", raw)


def told(session: Session, prompt: list[int], drafts: int, tokens: int) -> list[int]:
    """What greedy decoding answers."""
    answer: list[int] = []
    for new in generate(session, prompt, GREEDY, max_tokens=tokens, draft_tokens=drafts):
        answer += new
    return answer


def interleaved(session: Session, vocabulary: int) -> list[np.ndarray]:
    """Packed steps of two sequences, a draft taken back, and a third sequence where one has ended."""
    rng = np.random.default_rng(1)
    first, second = session.open(), session.open()
    steps = []

    def step(*parts: tuple[Any, int]) -> None:
        calls = [
            Call(s, rng.integers(0, vocabulary, n), np.array([0, n - 1][-min(n, 2) :])) for s, n in parts
        ]
        steps.extend(session.decode(calls))

    step((first, 9), (second, 4))
    step((first, 1), (second, 4))
    second.truncate(second.length - 3)
    step((second, 2), (first, 1))
    first.close()
    third = session.open()
    step((third, 5), (second, 1))
    hidden = steps[-2].hidden
    ids = rng.integers(0, vocabulary, 4)
    steps.extend(session.draft(0, [Call(third, ids, np.array([3]), hidden[:4])]))
    third.truncate_draft(0, 2)
    steps.extend(session.draft(0, [Call(third, ids[:1], np.array([0]), hidden[2:3])]))
    return [values for done in steps for values in (done.logits, done.hidden)]


def lead(directory: Path, prompt: list[int], tokens: int, out: Path) -> None:
    """A rank's whole life: the first one's answers go to `out`."""
    session = open_bundle(directory)
    assert isinstance(session, ProgramSession)
    ids = np.array(prompt)
    seen = evaluate(session, ids)
    packed = interleaved(session, session.config.vocab_size)
    np.savez(out / "seen.npz", logits=seen.logits, mtp=seen.mtp_logits)
    np.savez(out / "packed.npz", *packed)
    answers = {drafts: told(session, prompt, drafts, tokens) for drafts in (0, 3)}
    (out / "answers.json").write_text(json.dumps(answers))
    assert session.runner.ranks is not None
    session.runner.ranks.leave()


def see(directory: Path, prompt: list[int], out: Path) -> None:
    """A rank's life with nothing but given tokens."""
    session = open_bundle(directory)
    assert isinstance(session, ProgramSession)
    seen = evaluate(session, np.array(prompt))
    np.savez(out / "seen.npz", logits=seen.logits, mtp=seen.mtp_logits)
    assert session.runner.ranks is not None
    session.runner.ranks.leave()


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.nanmax(np.abs(a - b)) / np.nanmax(np.abs(b)))


def compare(
    checkpoint: Path, bundle: Path, ranks: int, prompt: list[int], out: Path, tokens: int = 8
) -> None:
    assert run_ranks(ranks, lead, bundle, prompt, tokens, out) == [0] * ranks
    alone = TorchSession.of(Checkpoint.open(checkpoint))
    want, got = evaluate(alone, np.array(prompt)), np.load(out / "seen.npz")
    assert relative(got["logits"], want.logits) < 1e-5
    assert relative(got["mtp"], want.mtp_logits) < 1e-5
    packed = np.load(out / "packed.npz")
    for name, values in zip(packed.files, interleaved(alone, alone.config.vocab_size), strict=True):
        assert relative(packed[name], values) < 1e-5
    answers = json.loads((out / "answers.json").read_text())
    expected = told(alone, prompt, 0, tokens)
    assert len(expected) == tokens  # no early stop
    assert answers == {"0": expected, "3": expected}


@pytest.mark.parametrize(
    ("ranks", "ways"),
    [(2, TENSOR), (2, EXPERT), (2, BOTH), (4, TENSOR), (4, EXPERT), (4, BOTH)],
    ids=["2-tensor", "2-expert", "2-both", "4-tensor", "4-expert", "4-both"],
)
def test_ranks_say_what_one_says(divisible: Path, tmp_path: Path, ranks: int, ways: dict[str, str]) -> None:
    bundle = shared_bundle(divisible, tmp_path / "bundle", ranks, **ways)
    prompt = np.random.default_rng(0).integers(6, 96, 19).tolist()
    compare(divisible, bundle, ranks, prompt, tmp_path)


def test_nano(tmp_path: Path) -> None:
    bundle = shared_bundle(NANO, tmp_path / "bundle", 2, **BOTH)
    prompt = np.random.default_rng(0).integers(6, 1000, 12).tolist()
    compare(NANO, bundle, 2, prompt, tmp_path)


def test_ranks_in_bf16(tmp_path: Path) -> None:
    """Sums of rounded summands are as near to exact arithmetic; a long prompt's order comes in two pieces."""
    prompt = np.random.default_rng(0).integers(6, 1000, 150).tolist()
    alone = open_bundle(shared_bundle(NANO, tmp_path / "alone", 1, "int4-awq", 200))
    assert isinstance(alone, ProgramSession)
    exact = TorchSession(alone.config, Widened(alone.runner.executor.weights))
    want, truth = (evaluate(session, np.array(prompt)) for session in (alone, exact))
    bundle = shared_bundle(NANO, tmp_path / "bundle", 2, "int4-awq", 200, **EXPERT)
    assert run_ranks(2, see, bundle, prompt, tmp_path) == [0, 0]
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
