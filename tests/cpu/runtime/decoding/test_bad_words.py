"""Words that do not come, and the log-probabilities of those that do."""

from __future__ import annotations

import math

import numpy as np
import pytest

from step35_trt.errors import UsageError
from step35_trt.runtime.decoding.generate import generate
from step35_trt.runtime.decoding.generation_stats import GenerationStats
from step35_trt.runtime.decoding.sampling import (
    SamplingParams,
    greedy,
    log_probability,
    probabilities,
    without_bad_words,
)
from tests.cpu.runtime.fakes import FakeModel, FakeSession


def test_a_word_is_banned_where_its_beginning_stands() -> None:
    logits = np.arange(12, dtype=np.float32).reshape(3, 4)
    banned = without_bad_words(logits, [7, 1, 2], [(1, 3), (1, 2, 3), (0,), (9, 1), (1, 99)])
    lowest = np.finfo(np.float32).min
    expected = logits.copy()
    expected[:, 0] = lowest  # of one token: everywhere
    expected[1, 3] = lowest  # after 7, 1
    expected[2, 3] = lowest  # after 7, 1, 2
    np.testing.assert_array_equal(banned, expected)
    assert logits[0, 0] == 0  # the caller's are as they were
    assert greedy(banned).tolist() == [3, 2, 2]
    params = SamplingParams(temperature=1.0)
    assert (probabilities(banned, params)[[0, 1, 2], [0, 3, 3]] == 0).all()


def test_the_start_of_the_text_is_no_beginning() -> None:
    logits = np.zeros((1, 4), dtype=np.float32)
    np.testing.assert_array_equal(without_bad_words(logits, [2], [(1, 2, 3)]), logits)


@pytest.mark.parametrize("drafts", [0, 3])
def test_generation_never_completes_a_bad_word(drafts: int) -> None:
    model = FakeModel.drawn(5)
    prompt = [1, 2, 3]
    free = model.greedy(prompt, 30)
    bad = tuple(free[10:12])
    whole = [*prompt, *free]
    first = next(i for i in range(len(whole)) if tuple(whole[i : i + 2]) == bad)
    stats = GenerationStats()
    sampling = SamplingParams(bad_words=(bad,), log_probabilities=True)
    chunks = generate(FakeSession(model), prompt, sampling, max_tokens=30, draft_tokens=drafts, stats=stats)
    taken = [token for chunk in chunks for token in chunk]
    whole = [*prompt, *taken]
    assert len(taken) == 30
    assert not any(tuple(whole[i : i + 2]) == bad for i in range(len(whole) - 1))
    assert whole[: first + 1] == [*prompt, *free][: first + 1]
    assert whole[first + 1] != bad[1]
    assert stats.log_probability < 0


def test_log_probabilities_are_the_models_own() -> None:
    logits = np.array([[0.0, math.log(3.0)], [1000.0, 1000.0], [5.0, 6.0]], dtype=np.float32)
    assert math.isclose(log_probability(logits, [1, 0]), math.log(0.75) + math.log(0.5), rel_tol=1e-6)


@pytest.mark.parametrize("drafts", [0, 2])
def test_the_sum_does_not_depend_on_drafts(drafts: int) -> None:
    model, prompt = FakeModel.drawn(5), [4, 2]
    expected = 0.0
    tokens = list(prompt)
    for _ in range(12):
        chunk = next(iter(generate(FakeSession(model), tokens, SamplingParams(), max_tokens=1)))
        stats = GenerationStats()
        sampling = SamplingParams(log_probabilities=True)
        list(generate(FakeSession(model), tokens, sampling, max_tokens=1, stats=stats))
        expected += stats.log_probability
        tokens += chunk
    stats = GenerationStats()
    sampling = SamplingParams(log_probabilities=True)
    list(generate(FakeSession(model), prompt, sampling, max_tokens=12, draft_tokens=drafts, stats=stats))
    assert math.isclose(stats.log_probability, expected, rel_tol=1e-5)


def test_an_empty_word_is_refused() -> None:
    with pytest.raises(UsageError, match="bad word"):
        SamplingParams(bad_words=((),))
