"""nano through the engines: drafting changes nothing and is accepted, int4 stays near."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.nano import prompts, session
from step35_trt.evaluate import differences, evaluate
from step35_trt.resources import NANO
from step35_trt.runtime.decoding.generate import generate
from step35_trt.runtime.decoding.generation_stats import GenerationStats
from step35_trt.runtime.decoding.sampling import SamplingParams
from step35_trt.runtime.dialogue.text import Text

if TYPE_CHECKING:
    from pathlib import Path

    from step35_trt.runtime.session import Session

pytestmark = pytest.mark.early

PROMPTS, TOKENS = 20, 128  # benchmarks/lossless.py has 200


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nano")


@pytest.fixture(scope="module")
def exact(bundles: Path) -> Session:
    return session("cpu-fp32", bundles)


def answer(
    model: Session, prompt: list[int], depth: int | str, tokens: int = TOKENS
) -> tuple[list[int], GenerationStats]:
    stats = GenerationStats()
    chunks = generate(
        model,
        prompt,
        SamplingParams(),
        max_tokens=tokens,
        draft_tokens=depth,
        stats=stats,  # type: ignore[arg-type]
    )
    return [token for chunk in chunks for token in chunk], stats


@pytest.fixture(scope="module")
def plain(exact: Session) -> list[tuple[list[int], list[int]]]:
    """Prompts with what the decoder alone makes of them."""
    return [(prompt, answer(exact, prompt, 0)[0]) for prompt in prompts(PROMPTS, 48)]


@pytest.mark.parametrize("depth", [1, 2, 3, "auto"])
def test_greedy_drafting_is_lossless(
    exact: Session, plain: list[tuple[list[int], list[int]]], depth: int | str
) -> None:
    accepted = [0, 0, 0]
    for prompt, alone in plain:
        drafted, stats = answer(exact, prompt, depth)
        assert drafted == alone
        accepted = [a + b for a, b in zip(accepted, stats.accepted, strict=True)]
    used = 3 if depth == "auto" else int(depth)
    assert all(accepted[:used])  # or rejection is all that was tested


def test_heads_are_accepted_on_held_out_text(exact: Session) -> None:
    drafted, accepted = [0, 0, 0], [0, 0, 0]
    for prompt in prompts(8, 64):
        _, stats = answer(exact, prompt, 3, 64)
        drafted = [a + b for a, b in zip(drafted, stats.drafted, strict=True)]
        accepted = [a + b for a, b in zip(accepted, stats.accepted, strict=True)]
    assert accepted[0] / drafted[0] > 0.4


def test_int4_stays_near(bundles: Path, exact: Session) -> None:
    import numpy as np

    ids = np.array(prompts(1, 256)[0])
    apart = differences(evaluate(exact, ids), evaluate(session("cpu-int4", bundles), ids))
    assert all(0 < part.mean_kl < 0.2 for part in apart)


def test_sampling_with_a_seed_repeats(exact: Session) -> None:
    prompt = prompts(1, 32)[0]
    params = SamplingParams(temperature=0.8, top_p=0.95, seed=7)

    def sampled(depth: int) -> list[int]:
        return [
            t for chunk in generate(exact, prompt, params, max_tokens=48, draft_tokens=depth) for t in chunk
        ]

    assert sampled(2) == sampled(2)


def test_text_streams_as_it_decodes(exact: Session) -> None:
    from step35_trt.runtime.dialogue.answer_text import complete

    text = Text.load(NANO)
    ids = text.encode("The import statement")
    taken: list[int] = []
    pieces = list(complete(exact, text, ids, SamplingParams(), max_tokens=64, token_ids=taken))
    assert len(pieces) > 5
    assert "".join(pieces) == text.decode(taken)
