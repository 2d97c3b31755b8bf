"""What a session that several processes share is asked, and whether its answers are those of one alone."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from step35_trt.evaluate import evaluate
from step35_trt.runtime.decoding.generate import generate
from step35_trt.runtime.decoding.sampling import SamplingParams
from step35_trt.runtime.load import open_bundle
from step35_trt.runtime.session import Call
from step35_trt.runtime.session_program import ProgramSession

if TYPE_CHECKING:
    from pathlib import Path

    from step35_trt.runtime.session import Session

TENSOR = {"attention": "tensor", "experts": "tensor", "mlp": "tensor", "head": "tensor"}
EXPERT = {"experts": "expert"}
BOTH = {"attention": "tensor", "experts": "expert", "mlp": "tensor", "head": "tensor"}
WAYS = [(2, TENSOR), (2, EXPERT), (2, BOTH), (4, TENSOR), (4, EXPERT), (4, BOTH)]
NAMES = ["2-tensor", "2-expert", "2-both", "4-tensor", "4-expert", "4-both"]
GREEDY = SamplingParams(0.0, 1.0, 0, 0.0, None)


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


def answer(session: Session, prompt: list[int], tokens: int, out: Path) -> None:
    """Write down all that is asked."""
    out.mkdir(exist_ok=True)
    seen = evaluate(session, np.array(prompt))
    packed = interleaved(session, session.config.vocab_size)
    np.savez(out / "seen.npz", logits=seen.logits, mtp=seen.mtp_logits)
    np.savez(out / "packed.npz", *packed)
    answers = [told(session, prompt, drafts, tokens) for drafts in (0, 3)]
    (out / "answers.json").write_text(json.dumps(answers))


def tell(session: ProgramSession, prompt: list[int], tokens: int, out: Path) -> None:
    """The first process: `answer`, and send the others home."""
    answer(session, prompt, tokens, out)
    send_home(session)


def tell_of(bundle: Path, prompt: list[int], tokens: int, out: Path) -> None:
    """A rank's whole life; the first one's answers go to `out`."""
    tell(opened(bundle), prompt, tokens, out)


def see(session: ProgramSession, ids: list[int], out: Path) -> None:
    """The first process, with nothing but given tokens."""
    seen = evaluate(session, np.array(ids))
    np.savez(out / "seen.npz", logits=seen.logits, mtp=seen.mtp_logits)
    send_home(session)


def see_of(bundle: Path, ids: list[int], out: Path) -> None:
    """A rank's life with nothing but given tokens."""
    see(opened(bundle), ids, out)


def send_home(session: ProgramSession) -> None:
    """What the first process ends with: the others wait for its next order."""
    assert session.runner.ranks is not None
    session.runner.ranks.leave()


def opened(bundle: Path) -> ProgramSession:
    """A rank's session; a follower does not come back."""
    session = open_bundle(bundle)
    assert isinstance(session, ProgramSession)
    return session


def compare(want: Path, got: Path, tokens: int) -> None:
    """Two `answer`s: values but for the order of additions, tokens exactly, with and without drafts."""
    for name in ("seen.npz", "packed.npz"):
        ours, theirs = np.load(got / name), np.load(want / name)
        assert ours.files == theirs.files
        for part in ours.files:
            assert relative(ours[part], theirs[part]) < 1e-5
    expected, _ = json.loads((want / "answers.json").read_text())
    assert len(expected) == tokens  # no early stop
    assert json.loads((got / "answers.json").read_text()) == [expected, expected]


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """The largest error over the largest value."""
    return float(np.nanmax(np.abs(a - b)) / np.nanmax(np.abs(b)))
