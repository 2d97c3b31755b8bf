"""Drafting must not change what is sampled: long answers against their exact distribution."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import chi2

from step35_trt.runtime.decoding import drafting, rounds, sampling
from step35_trt.runtime.decoding.generate import generate
from step35_trt.runtime.decoding.generation_stats import GenerationStats
from step35_trt.runtime.decoding.sampling import SamplingParams, probabilities
from tests.cpu.runtime.decoding.test_sampling import always_accept, redraw_from_target
from tests.cpu.runtime.fakes import FakeModel, FakeSession, chi_square, exact_probabilities

pytestmark = pytest.mark.early

VARIANTS = {
    "temperature": SamplingParams(temperature=1.3, seed=1),
    "top-p": SamplingParams(temperature=1.6, top_p=0.9, seed=2),
    "top-k": SamplingParams(temperature=1.3, top_k=5, seed=3),
    "all": SamplingParams(temperature=1.8, top_k=7, top_p=0.95, min_p=0.1, seed=4),
}


@pytest.fixture
def remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake has few different rows of logits; filtering each once is enough."""
    known: dict[Any, Any] = {}

    def lookup(logits: Any, params: SamplingParams) -> Any:
        key = (logits.tobytes(), params)
        if key not in known:
            known[key] = probabilities(logits, params)
        return known[key]

    monkeypatch.setattr(sampling, "probabilities", lookup)
    monkeypatch.setattr(drafting, "probabilities", lookup)


def p_value(draft_tokens: Any, params: SamplingParams, count: int) -> tuple[float, GenerationStats]:
    """Every token of one long answer against its exact distribution given the two tokens before it.

    The counts of a chain's transitions are, given the contexts, those of independent draws, so Pearson's
    statistic adds up over contexts.
    """
    model = FakeModel.drawn(17, vocabulary=8, noise=0.7)
    session = FakeSession(model, max_tokens=count + 8, checked=False)
    stats = GenerationStats()
    answer = generate(session, [3, 5], params, max_tokens=count, draft_tokens=draft_tokens, stats=stats)
    line = np.array([3, 5, *(token for part in answer for token in part)])
    assert len(line) == count + 2
    seen = np.zeros((8, 8, 8))
    np.add.at(seen, (line[:-2], line[1:-1], line[2:]), 1)
    total, freedom = 0.0, 0
    for before, last in np.argwhere(seen.sum(axis=2) >= 40):
        counts = seen[before, last]
        exact = np.array(exact_probabilities(model.decoder[before, last], params))
        try:
            part = chi_square(counts, counts.sum() * exact)
        except AssertionError:  # a token of probability 0
            return 0.0, stats
        total, freedom = total + part[0], freedom + part[1]
    assert freedom > 100
    return float(chi2.sf(total, freedom)), stats


# 25,000 draws of each variant: 100,000 for each number of drafts; fewer without, and where depths alternate.
@pytest.mark.usefixtures("remembered")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("draft_tokens", [0, 1, 2, 3, "auto"])
def test_sampled_output_has_the_exact_distribution_whatever_is_drafted(
    draft_tokens: Any, variant: str
) -> None:
    value, stats = p_value(draft_tokens, VARIANTS[variant], 25_000 if draft_tokens in (1, 2, 3) else 5_000)
    assert value > 1e-4
    if draft_tokens == "auto":
        assert 200 < stats.drafted[1] < stats.drafted[0] - 20  # more than one depth was in use
    elif draft_tokens:
        assert all(0.2 < share < 0.99 for share in stats.acceptance[:draft_tokens])


@pytest.mark.usefixtures("remembered")
@pytest.mark.parametrize(("wrong", "draws"), [(always_accept, 5_000), (redraw_from_target, 10_000)])
@pytest.mark.parametrize("draft_tokens", [1, 3, "auto"])
def test_a_wrong_verifier_shows_in_the_distribution(
    wrong: Any, draws: int, draft_tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "verify", wrong)
    assert p_value(draft_tokens, VARIANTS["temperature"], draws)[0] < 1e-4
