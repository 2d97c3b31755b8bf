"""Figures of loads whose times are known."""

from __future__ import annotations

import pytest

from step35_trt.bench.figures import Measured, Spread, measure
from step35_trt.bench.load import Answer, Load
from step35_trt.bench.report import as_json, render, tables
from step35_trt.config import Step35Config
from step35_trt.engine import EngineSpec
from step35_trt.plan.plan import make_plan
from step35_trt.resources import NANO
from step35_trt.runtime.decoding.generation_stats import GenerationStats
from step35_trt.runtime.scheduling.requests import Finished
from tests.cpu.pages.structure import check_page

CONFIG = Step35Config.load(NANO)
SPEC = EngineSpec.load("cpu-int4")


def answer(sent: float, *arrivals: tuple[float, int], drafted: int = 0, accepted: int = 0) -> Answer:
    """An answer to 10 tokens, with drafts of the first head."""
    count = sum(n for _, n in arrivals)
    stats = GenerationStats(
        prompt_tokens=10,
        generated_tokens=count,
        rounds=len(arrivals) - 1,
        drafted=[drafted, 0, 0],
        accepted=[accepted, 0, 0],
        finish_reason="length",
    )
    return Answer(sent, arrivals, Finished("length", stats, 0.0, None, 0.0))


def load(*answers: Answer, concurrency: int = 1, seconds: float = 10.0) -> Load:
    return Load(concurrency, seconds, answers)


def measured(*answers: Answer, concurrency: int = 1) -> Measured:
    return measure(load(*answers, concurrency=concurrency), CONFIG, SPEC)


def test_latencies_of_one_answer() -> None:
    result = measured(answer(1.0, (1.5, 1), (1.75, 2), (2.5, 1), drafted=2, accepted=1))
    assert result.first_token.mean == pytest.approx(0.5)
    assert result.per_token.mean == pytest.approx(1.0 / 3)  # the first token belongs to the prompt
    assert result.between.mean == pytest.approx(0.5)
    assert result.between.p50 == pytest.approx(0.5)
    assert result.whole.mean == pytest.approx(1.5)
    assert result.acceptance == (0.5, 0.0, 0.0)
    assert result.accepted_length == pytest.approx(1.5)
    assert (result.input_tokens, result.output_tokens) == (10, 4)
    assert result.output_rate == pytest.approx(0.4)


def test_answers_of_one_token_have_no_time_per_token() -> None:
    result = measured(answer(0.0, (1.0, 1)))
    assert result.per_token == Spread(0.0, 0.0, 0.0, 0.0)
    assert result.decode_rate == 0.0
    assert result.of_roofline == 0.0


def test_percentiles_are_over_requests() -> None:
    answers = [answer(0.0, (0.01 * n, 1), (1.0 + 0.01 * n, 1)) for n in range(101)]
    spread = measured(*answers).first_token
    assert (spread.p50, spread.p90, spread.p99) == pytest.approx((0.5, 0.9, 0.99))


def test_roofline_is_the_plans_at_the_measured_acceptance() -> None:
    right = answer(0.0, (0.0, 1), (1.0, 2), drafted=1, accepted=1)
    result = measured(right, right, concurrency=2)
    roofline = make_plan(CONFIG, SPEC).roofline
    acceptance = (1.0, 0.0, 0.0)
    context = 12  # the prompt and half of the answer
    rates = [roofline.step(2, context, k, acceptance).tokens_per_second for k in range(4)]
    assert result.roofline_rate == pytest.approx(max(rates))
    assert max(rates) > rates[0]
    assert result.decode_rate == pytest.approx(4.0)
    assert result.of_roofline == pytest.approx(4.0 / max(rates))


def test_without_hardware_there_is_no_roofline() -> None:
    spec = SPEC.model_copy(update={"hardware": None})
    result = measure(load(answer(0.0, (1.0, 1), (2.0, 1))), CONFIG, spec)
    assert result.roofline_rate is None
    assert result.of_roofline is None
    assert "of roofline" not in tables([result], spec)[0].columns


def test_report_shows_every_run() -> None:
    runs = [measured(answer(0.0, (0.5, 1), (1.0, 3)), concurrency=n) for n in (1, 4)]
    throughput, latency = tables(runs, SPEC)
    assert [row[0] for row in throughput.rows] == ["1", "4"]
    assert all(len(row) == len(throughput.columns) for row in throughput.rows)
    assert latency.rows[0] == ("1", "time to first token", "500.00", "500.00", "500.00", "500.00")
    data = as_json(runs, SPEC)["runs"]
    assert isinstance(data, list)
    assert data[1]["output_rate"] == pytest.approx(0.4)
    page = render(runs, SPEC, "A load.")
    check_page(page)
    assert "4 in flight: 500.0 ms" in page
