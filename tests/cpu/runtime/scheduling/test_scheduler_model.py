"""The scheduler over the model itself: small random checkpoints, through the torch session."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from step35_trt.runtime.decoding.generate import generate
from step35_trt.runtime.decoding.sampling import SamplingParams
from step35_trt.runtime.load import load_reference
from step35_trt.runtime.scheduling.requests import Event, Finished, Limits, TokenRequest, Tokens
from step35_trt.runtime.scheduling.scheduler import Scheduler

if TYPE_CHECKING:
    from pathlib import Path

LENGTHS = (1, 3, 30, 17, 9, 45)  # the window is 8, and 64 in the larger geometry
DRAFTS = ("auto", 0, 3, "auto", 1, 2)


@pytest.mark.parametrize("name", ["small-window", "large-window"])
def test_each_request_gets_what_it_gets_alone(checkpoints: dict[str, Path], name: str) -> None:
    session = load_reference(checkpoints[name])
    rng = np.random.default_rng(3)
    asked = []
    for length, drafts in zip(LENGTHS, DRAFTS, strict=True):
        params = SamplingParams(temperature=1.0, seed=length) if length in (3, 17) else SamplingParams()
        prompt = rng.integers(0, session.config.vocab_size, length).tolist()
        asked.append(TokenRequest(prompt, 14, params, draft_tokens=drafts))  # type: ignore[arg-type]
    scheduler = Scheduler(session, Limits(sequences=4, step_tokens=24))
    answers: list[list[int]] = [[] for _ in asked]
    ends: list[Event] = []
    for request, answer in zip(asked, answers, strict=True):

        def sink(event: Event, answer: list[int] = answer) -> None:
            if isinstance(event, Tokens):
                answer += event.token_ids
            else:
                ends.append(event)

        scheduler.submit(request, sink)
        scheduler.step()
    while not scheduler.idle:
        scheduler.step()
    assert len(ends) == len(asked)
    assert all(isinstance(end, Finished) and end.reason == "length" for end in ends)
    metrics = scheduler.metrics()
    assert metrics.steps < sum(end.stats.rounds + 1 for end in ends if isinstance(end, Finished))
    assert metrics.running == metrics.waiting == 0
    for request, answer in zip(asked, answers, strict=True):
        parts = generate(
            session, request.prompt_ids, request.sampling, max_tokens=14, draft_tokens=request.draft_tokens
        )
        assert answer == [token for part in parts for token in part]
