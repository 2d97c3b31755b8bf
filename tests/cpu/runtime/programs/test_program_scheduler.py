"""The scheduler over a device session whose pages are too few for all requests at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from step35_trt.runtime.cache.cache_extent import Extent
from step35_trt.runtime.decoding.generate import generate
from step35_trt.runtime.decoding.sampling import SamplingParams
from step35_trt.runtime.scheduling.requests import (
    Event,
    Finished,
    Limits,
    RequestHandle,
    TokenRequest,
    Tokens,
)
from step35_trt.runtime.scheduling.scheduler import Scheduler
from step35_trt.runtime.session import MOST_REJECTED
from step35_trt.runtime.session_torch import TorchSession
from tests.cpu.runtime.cache.test_program_pages import Model
from tests.synthetic import raw_config, write_checkpoint
from tests.tape import TapeRecorder

PAGE = 16
ANSWER = 12
EXTENT = Extent(slots=3, rows=96, call=24, cached=10 * PAGE, page=PAGE)
STARTS = (0, 20, 40)  # tokens that prompts share
TAILS = (1, 5, 16, 33)


@dataclass
class Asked:
    """A request, what it is told, and what it would be told alone."""

    want: list[int]
    got: list[int] = field(default_factory=list)
    end: Event | None = None
    handle: RequestHandle | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, Tokens):
            self.got += event.token_ids
        else:
            self.end = event


@pytest.fixture(scope="module", params=[8, 64], ids=["small-window", "large-window"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    raw = raw_config(layers=5, sliding_window=request.param, moe_num_experts=4, moe_top_k=2)
    return Model.of(write_checkpoint(tmp_path_factory.mktemp("scheduled") / "checkpoint", raw))


@pytest.fixture(scope="module")
def prompts(model: Model) -> dict[tuple[int, int, int], tuple[list[int], list[int]]]:
    """By shared tokens, further tokens and a number: a prompt and the model's answer to it."""
    rng, vocabulary = np.random.default_rng(5), model.checkpoint.config.vocab_size
    oracle, made = TorchSession.of(model.checkpoint), {}
    common = rng.integers(0, vocabulary, max(STARTS))
    for start in STARTS:
        for tail in TAILS:
            for number in range(2):
                prompt = np.append(common[:start], rng.integers(0, vocabulary, tail)).tolist()
                parts = generate(oracle, prompt, SamplingParams(), max_tokens=ANSWER, draft_tokens=0)
                made[start, tail, number] = prompt, [token for part in parts for token in part]
    return made


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_each_request_gets_what_it_gets_alone(
    model: Model, prompts: dict[tuple[int, int, int], Any], data: st.DataObject
) -> None:
    """Arrivals, cancellations, prompts that begin alike, drafts: no request fails, and no page is lost."""
    session: Any = model.session(EXTENT, TapeRecorder() if data.draw(st.booleans(), "recorded") else None)
    scheduler = Scheduler(session, Limits(sequences=data.draw(st.integers(1, 4), "sequences")))
    asked: list[Asked] = []
    for _ in range(data.draw(st.integers(1, 9), "requests")):
        prompt, answer = prompts[data.draw(st.sampled_from(sorted(prompts)), "prompt")]
        count = data.draw(st.integers(1, ANSWER), "answer")
        drafts = data.draw(st.sampled_from([0, 1, 3, "auto"]), "drafts")
        one = Asked(answer[:count])
        one.handle = scheduler.submit(TokenRequest(prompt, count, draft_tokens=drafts), one)
        asked.append(one)
        for _ in range(data.draw(st.integers(0, 5), "turns")):
            scheduler.step()
        if data.draw(st.integers(0, 4)) == 0:
            data.draw(st.sampled_from(asked), "cancelled").handle.cancel()
    for _ in range(500):
        if scheduler.idle:
            break
        scheduler.step()
    assert scheduler.idle
    for one in asked:
        assert isinstance(one.end, Finished)
        if one.end.reason == "cancelled":
            assert one.got == one.want[: len(one.got)]
        else:
            assert one.got == one.want
    assert session.capacity.sequences == EXTENT.slots
    assert not any(pool.held for pool in session._account.pools.values())


def test_what_others_left_is_not_computed_again(model: Model, prompts: dict[Any, Any]) -> None:
    session: Any = model.session(EXTENT)
    scheduler = Scheduler(session, Limits(sequences=1))
    for key in ((40, 16, 0), (40, 33, 1), (40, 16, 0)):
        prompt, answer = prompts[key]
        one = Asked(answer)
        scheduler.submit(TokenRequest(prompt, ANSWER, draft_tokens=3), one)
        while not scheduler.idle:
            scheduler.step()
        assert one.got == one.want
    # Of the second prompt two pages are the first one's; of the third all but the tokens that modules await,
    # unless the window passes rows before the tokens that those look ahead to are settled.
    third = 2 if model.checkpoint.config.sliding_window < MOST_REJECTED + 3 else 3
    assert scheduler.metrics().reused_tokens == 2 * PAGE + third * PAGE
