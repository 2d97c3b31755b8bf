from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from step35_trt.errors import UsageError, VerificationError
from step35_trt.runtime.decoding.sampling import (
    SamplingParams,
    TargetRows,
    draw,
    greedy,
    probabilities,
    verify,
    verify_greedy,
)
from tests.cpu.runtime.fakes import chi_square, exact_probabilities


@pytest.mark.parametrize(
    "field",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "1"},
        {"temperature": True},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"top_k": -1},
        {"top_k": 2.0},
        {"top_k": True},
        {"min_p": -0.01},
        {"min_p": 1.5},
        {"min_p": math.nan},
        {"seed": -1},
        {"seed": 1.5},
        {"seed": False},
    ],
)
def test_a_wrong_parameter_is_one_sentence_that_names_it(field: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        SamplingParams(**field)
    ((name, value),) = field.items()
    assert caught.value.message.startswith(f"{name} must be")
    assert repr(value) in caught.value.message
    assert "\n" not in caught.value.message


def test_numpy_numbers_are_numbers() -> None:
    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.uint32(7))  # type: ignore[arg-type]
    assert not params.greedy


FILTERS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-3, 0.3, 0.7, 1.0, 2.5]),
    # No shares that equal tokens can add up to: rounding would decide.
    top_p=st.sampled_from([1.0, 0.983, 0.77, 0.51, 0.26, 0.001]),
    top_k=st.sampled_from([0, 0, 1, 2, 3, 7, 50]),
    min_p=st.sampled_from([0.0, 0.0, 0.03, 0.4, 1.0]),
)


@settings(max_examples=120, deadline=None)
@given(
    rows=st.integers(1, 12).flatmap(
        lambda size: st.lists(
            st.lists(st.integers(-12, 12).map(lambda x: x / 2), min_size=size, max_size=size),
            min_size=1,
            max_size=3,
        )
    ),
    params=FILTERS,
)
def test_probabilities_are_the_filters_by_the_book(rows: list[list[float]], params: SamplingParams) -> None:
    logits = np.array(rows, dtype=np.float32)
    expected = [exact_probabilities(row, params) for row in rows]
    np.testing.assert_allclose(probabilities(logits, params), expected, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.8, top_k=20),
        SamplingParams(temperature=0.8, top_k=5000),
        SamplingParams(temperature=0.8, top_p=0.9),
        SamplingParams(temperature=3.0, top_p=0.999, min_p=1e-4),
        SamplingParams(temperature=0.6, top_p=0.95, top_k=40, min_p=0.01),
    ],
    ids=str,
)
@pytest.mark.parametrize("step", [0.5, 1e-4])
def test_a_large_vocabulary_is_selected_from_as_if_sorted(params: SamplingParams, step: float) -> None:
    rng = np.random.default_rng(3)
    row = (np.round(rng.normal(size=20_011) * 3 / step) * step).astype(np.float32)
    ranked = np.lexsort((np.arange(row.size), -row))[: params.top_k or None]
    weights = np.exp((row[ranked].astype(np.float64) - row.max()) / params.temperature)
    if params.top_p < 1:
        weights[1:][weights.cumsum()[:-1] >= params.top_p * weights.sum()] = 0
    weights[weights < params.min_p] = 0
    expected = np.zeros(row.size)
    expected[ranked] = weights / weights.sum()
    got = probabilities(row[None], params)[0]
    # A weight at the very edge of the nucleus may fall either way by rounding; nothing else may differ.
    differing = np.flatnonzero((got > 0) != (expected > 0))
    assert differing.size <= (1 if params.top_p < 1 else 0)
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=2 * expected[expected > 0].min())


def test_ties_at_an_edge_are_kept_from_the_lowest_id() -> None:
    logits = np.zeros((1, 5000), dtype=np.float32)
    logits[0, 4000] = 1
    for params in (SamplingParams(temperature=1, top_k=3), SamplingParams(temperature=1, top_p=4.2 / 5001.7)):
        assert np.flatnonzero(probabilities(logits, params)[0]).tolist() == [0, 1, 4000]
    half = probabilities(np.zeros((1, 4), dtype=np.float32), SamplingParams(temperature=1, top_p=0.5))
    assert half.tolist() == [[0.5, 0.5, 0, 0]]
    assert greedy(np.zeros((2, 7), dtype=np.float32)).tolist() == [0, 0]


@pytest.mark.filterwarnings("error")
def test_a_temperature_next_to_zero_is_greedy_without_a_warning() -> None:
    logits = np.array([[1.0, 3.0, 2.0], [-5.0, -7.0, -6.0]], dtype=np.float32)
    cold = probabilities(logits, SamplingParams(temperature=1e-310))
    np.testing.assert_array_equal(cold, probabilities(logits, SamplingParams()))
    np.testing.assert_array_equal(cold.argmax(axis=1), greedy(logits))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad: float, temperature: float) -> None:
    logits = np.zeros((2, 9), dtype=np.float32)
    logits[1, 4] = bad
    with pytest.raises(VerificationError, match="not finite"):
        probabilities(logits, SamplingParams(temperature=temperature))
    with pytest.raises(VerificationError, match="not finite"):
        greedy(logits)
    rows = TargetRows(logits, SamplingParams(temperature=temperature))
    assert rows[0].sum() == pytest.approx(1)
    with pytest.raises(VerificationError, match="not finite"):
        rows[1]


def test_draw_follows_the_weights_and_never_takes_an_impossible_id() -> None:
    weights = np.array([0.0, 3.0, 0.0, 0.0, 1.0, 2.5e-4, 0.0])
    rng = np.random.default_rng(11)
    counts = np.bincount([draw(weights, rng) for _ in range(100_000)], minlength=7)
    statistic, freedom = chi_square(counts, 100_000 * weights / weights.sum())
    assert chi2.sf(statistic, freedom) > 1e-4


class Extreme:
    """Stands in for a generator at the ends of its range."""

    def __init__(self, value: float) -> None:
        self._value = value

    def random(self) -> float:
        return self._value


@pytest.mark.parametrize("value", [0.0, 1 - 2**-53])
def test_draw_at_the_ends_of_the_range(value: float) -> None:
    weights = np.array([0.0, 0.1, 0.3, 0.0])
    assert draw(weights, Extreme(value)) == (1 if value == 0 else 2)  # type: ignore[arg-type]


def always_accept(drafts: Any, draft_probs: Any, target_probs: Any, rng: Any) -> tuple[int, int]:
    return len(drafts), draw(target_probs[len(drafts)], rng)


def redraw_from_target(drafts: Any, draft_probs: Any, target_probs: Any, rng: Any) -> tuple[int, int]:
    for place, token in enumerate(drafts):
        if rng.random() * draft_probs[place][token] >= target_probs[place][token]:
            return place, draw(target_probs[place], rng)
    return len(drafts), draw(target_probs[len(drafts)], rng)


def p_value_of(verifier: Any, depth: int) -> float:
    """Each token out of 40,000 rounds against the decoder's rows, over the rounds that got that far."""
    rng = np.random.default_rng(depth)
    params = SamplingParams(temperature=0.9, top_k=7)
    target = probabilities(rng.normal(size=(depth + 1, 9)).astype(np.float32), params)
    source = probabilities(rng.normal(size=(depth, 9)).astype(np.float32), params)
    counts = np.zeros((depth + 1, 9))
    drawn = [rng.choice(9, p=row, size=40_000) for row in source]
    for drafts in np.stack(drawn, axis=1).tolist() if depth else [[]] * 40_000:
        accepted, token = verifier(drafts, source, target, rng)
        counts[range(accepted), drafts[:accepted]] += 1
        counts[accepted, token] += 1
    try:
        parts = [chi_square(seen, seen.sum() * row) for seen, row in zip(counts, target, strict=True)]
    except AssertionError:  # a token of probability 0
        return 0.0
    return float(chi2.sf(sum(part[0] for part in parts), sum(part[1] for part in parts)))


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_verification_changes_no_distribution(depth: int) -> None:
    assert p_value_of(verify, depth) > 1e-4


@pytest.mark.parametrize("wrong", [always_accept, redraw_from_target])
def test_a_wrong_verifier_is_noticed(wrong: Any) -> None:
    assert p_value_of(wrong, 1) < 1e-4


def test_drafts_are_accepted_as_often_as_the_distributions_overlap() -> None:
    p, q = np.array([[0.5, 0.3, 0.2], [1, 0, 0]]), np.array([[0.1, 0.2, 0.7]])
    rng = np.random.default_rng(5)
    hits = sum(verify([draw(q[0], rng)], q, p, rng)[0] for _ in range(20_000))
    assert hits / 20_000 == pytest.approx(np.minimum(p[0], q[0]).sum(), abs=0.015)  # four standard deviations


def test_verification_where_nothing_or_everything_overlaps() -> None:
    rng = np.random.default_rng(0)
    p, q = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]), np.array([[1.0, 0.0, 0.0]])
    assert verify([0], q, p, rng) == (0, 2)
    assert verify([2], p[:1], p, rng) == (1, 1)
    # Rows equal up to rounding: a refusal leaves nothing of max(p - q, 0), and the target takes over.
    near = np.array([[0.3, 0.7]])
    assert verify([0], near * (1 + 1e-16), np.array([[0.0, 0.7], [1, 0]]), Extreme(0.5)) == (0, 1)  # type: ignore[arg-type]
    assert verify([0], near * 1.5, near, Extreme(0.9)) == (0, 1)  # type: ignore[arg-type]


@settings(max_examples=100, deadline=None)
@given(data=st.data(), depth=st.integers(0, 3))
def test_greedy_verification_is_the_sampled_one_with_certain_rows(data: st.DataObject, depth: int) -> None:
    ids = st.lists(st.integers(0, 2), min_size=depth, max_size=depth)
    drafts, targets = data.draw(ids), [*data.draw(ids), data.draw(st.integers(0, 2))]
    one_hot = np.eye(3)
    expected = verify(drafts, one_hot[drafts], one_hot[targets], np.random.default_rng(1))
    assert verify_greedy(drafts, np.array(targets)) == expected
