"""What a load comes to.

Time to first token (TTFT) runs from submission, so it includes waiting. Time per output token (TPOT) is a
request's time after its first token by the tokens that came then. Inter-token latency is the gap between two
deliveries, each of which may hold several tokens.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from step35_trt.plan.plan import make_plan

if TYPE_CHECKING:
    from collections.abc import Iterable

    from step35_trt.bench.load import Answer, Load
    from step35_trt.config import Step35Config
    from step35_trt.engine import EngineSpec

SHARES = (50, 90, 99)


@dataclass(frozen=True)
class Spread:
    """Mean and percentiles of a set of seconds."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """All zero where there are no values."""
        array = np.fromiter(values, dtype=np.float64)
        if not array.size:
            return cls(0.0, 0.0, 0.0, 0.0)
        return cls(float(array.mean()), *map(float, np.percentile(array, SHARES)))


@dataclass(frozen=True)
class Measured:
    """One load's figures; seconds, and tokens a second of all requests together.

    Attributes:
        concurrency: Requests in flight.
        requests: Answered.
        input_tokens: Of all prompts.
        output_tokens: Of all answers.
        seconds: From the first request to the last answer.
        first_token: TTFT.
        per_token: TPOT.
        between: Inter-token latency.
        whole: From submission to the last token.
        acceptance: Of each MTP head, of what was drafted with it.
        accepted_length: Tokens that a round settles on average.
        decode_rate: Tokens per second while all of them decode: concurrency by mean TPOT; 0 without TPOT.
        roofline_rate: What `plan` projects for that on the engine's own hardware; None where it names none.
    """

    concurrency: int
    requests: int
    input_tokens: int
    output_tokens: int
    seconds: float
    first_token: Spread
    per_token: Spread
    between: Spread
    whole: Spread
    acceptance: tuple[float, ...]
    accepted_length: float
    decode_rate: float
    roofline_rate: float | None

    @property
    def output_rate(self) -> float:
        """Generated tokens per second, over everything."""
        return self.output_tokens / self.seconds

    @property
    def of_roofline(self) -> float | None:
        """Share of the projected rate that was reached."""
        return self.decode_rate / self.roofline_rate if self.roofline_rate else None


def measure(load: Load, config: Step35Config, spec: EngineSpec) -> Measured:
    """The figures of a load on a bundle of `config` built for `spec`."""
    answers = load.answers
    stats = [answer.finished.stats for answer in answers]
    rounds = sum(s.rounds for s in stats)
    drafted = np.sum([s.drafted for s in stats], axis=0)
    accepted = np.sum([s.accepted for s in stats], axis=0)
    acceptance = tuple(float(a / d) if d else 0.0 for a, d in zip(accepted, drafted, strict=True))
    per_token = Spread.of(rate for answer in answers for rate in _per_token(answer))
    inputs, outputs = sum(s.prompt_tokens for s in stats), sum(s.generated_tokens for s in stats)
    middle = round((inputs + outputs / 2) / len(answers))
    return Measured(
        concurrency=load.concurrency,
        requests=len(answers),
        input_tokens=inputs,
        output_tokens=outputs,
        seconds=load.seconds,
        first_token=Spread.of(a.arrivals[0][0] - a.sent for a in answers if a.arrivals),
        per_token=per_token,
        between=Spread.of(gap for answer in answers for gap in _gaps(answer)),
        whole=Spread.of(a.arrivals[-1][0] - a.sent for a in answers if a.arrivals),
        acceptance=acceptance,
        accepted_length=1 + float(accepted.sum()) / rounds if rounds else 0.0,
        decode_rate=load.concurrency / per_token.mean if per_token.mean else 0.0,
        roofline_rate=_roofline(config, spec, load.concurrency, middle, acceptance),
    )


def _per_token(answer: Answer) -> list[float]:
    later = sum(count for _, count in answer.arrivals[1:])
    return [(answer.arrivals[-1][0] - answer.arrivals[0][0]) / later] if later else []


def _gaps(answer: Answer) -> list[float]:
    times = [at for at, _ in answer.arrivals]
    return [after - before for before, after in itertools.pairwise(times)]


def _roofline(
    config: Step35Config, spec: EngineSpec, sequences: int, context: int, acceptance: tuple[float, ...]
) -> float | None:
    """Projected with as many drafts as would be best at this acceptance."""
    if spec.hardware is None:
        return None
    roofline = make_plan(config, spec).roofline
    depths = range(len(acceptance) + 1)
    return max(roofline.step(sequences, context, k, acceptance).tokens_per_second for k in depths)
