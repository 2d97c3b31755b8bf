from __future__ import annotations

import pytest

from step35_trt.runtime.decoding.depth import DepthController
from step35_trt.runtime.decoding.generate import generate
from step35_trt.runtime.decoding.generation_stats import GenerationStats
from step35_trt.runtime.decoding.sampling import SamplingParams
from tests.cpu.runtime.fakes import FakeModel, FakeSession, Scripted, flat

GREEDY = SamplingParams()


def test_drafting_never_costs_more_rounds_than_it_must() -> None:
    model = FakeModel.drawn(1, noise=0.0)
    for draft_tokens in range(4):
        stats = GenerationStats()
        list(
            generate(
                FakeSession(model), [1, 2], GREEDY, max_tokens=49, draft_tokens=draft_tokens, stats=stats
            )
        )
        assert stats.rounds == 48 // (draft_tokens + 1)
        assert stats.drafted == stats.accepted == [stats.rounds] * draft_tokens + [0] * (3 - draft_tokens)
        assert stats.mean_accepted_length == draft_tokens + 1


def test_stats_are_the_numbers() -> None:
    # Head 0 is always right, head 1 never, so a round of two drafts settles two tokens.
    exact = FakeModel.drawn(1, noise=0.0)
    heads = exact.heads.copy()
    heads[1] = -heads[1]
    session = FakeSession(FakeModel(exact.decoder, heads), prefill_chunk=4)
    stats = GenerationStats()
    answer = generate(
        session, [1, 2, 3, 4, 5, 6], GREEDY, max_tokens=11, draft_tokens=2, stats=stats, clock=session.clock
    )
    next(answer)
    assert (stats.prompt_tokens, stats.generated_tokens, stats.rounds) == (6, 1, 0)
    assert (stats.tokens_per_second, stats.mean_accepted_length, stats.finish_reason) == (0.0, 0.0, None)
    session.clock.now += 1000  # the caller's own time
    before = session.clock.now
    rest = flat(answer)
    # The decoder's two chunks, and rows 0 .. 3 of both modules; the others join the drafts.
    assert stats.prefill_seconds == pytest.approx((1 + 3 * 0.25) + (1 + 0.25) + (4 + 4) * 0.125)
    assert len(rest) == 10
    assert stats.finish_reason == "length"
    assert (stats.rounds, stats.drafted, stats.accepted) == (5, [5, 4, 0], [5, 0, 0])
    assert stats.acceptance == (1.0, 0.0, 0.0)
    assert stats.mean_accepted_length == 2.0
    assert stats.decode_seconds == pytest.approx(session.clock.now - before - (4 + 4) * 0.125)
    assert stats.tokens_per_second == pytest.approx(10 / stats.decode_seconds)
    # A second answer starts from zero.
    list(generate(session, [1], GREEDY, max_tokens=1, stats=stats))
    assert (stats.prompt_tokens, stats.generated_tokens, stats.rounds, stats.drafted) == (1, 1, 0, [0, 0, 0])


def test_a_backlog_is_time_spent_but_not_what_the_depth_costs() -> None:
    session, policy, stats = FakeSession(FakeModel.drawn(2)), Scripted([0] * 50 + [3]), GenerationStats()
    answer = generate(
        session, [1], GREEDY, max_tokens=90, draft_tokens=policy, stats=stats, clock=session.clock
    )
    for _ in range(51):
        next(answer)
    before, spent = session.clock.now, stats.decode_seconds
    next(answer)
    assert session.clock.now - before > 3 * 45 * session.draft_seconds
    assert stats.decode_seconds - spent == pytest.approx(session.clock.now - before)
    assert policy.seconds[:50] == pytest.approx([1.0] * 50)
    assert policy.seconds[50] == pytest.approx(1 + 3 * 0.25 + (1 + 1 + 2) * 0.125)


@pytest.mark.parametrize(("noise", "draft_seconds", "best"), [(0.0, 0.01, 3), (0.0, 5.0, 0), (50.0, 0.2, 0)])
def test_auto_settles_on_what_pays(noise: float, draft_seconds: float, best: int) -> None:
    session = FakeSession(
        FakeModel.drawn(3, vocabulary=12, noise=noise), draft_seconds=draft_seconds, token_seconds=0.05
    )
    policy = DepthController(3)
    stats = GenerationStats()
    list(
        generate(session, [1], GREEDY, max_tokens=300, draft_tokens=policy, clock=session.clock, stats=stats)
    )
    assert policy.best(3) == best
    # What was learned goes along into the next answer.
    list(
        generate(session, [2], GREEDY, max_tokens=100, draft_tokens=policy, clock=session.clock, stats=stats)
    )
    if best == 3:
        assert stats.drafted[2] > 0.8 * stats.rounds
    else:
        assert stats.drafted[0] < 0.3 * stats.rounds
