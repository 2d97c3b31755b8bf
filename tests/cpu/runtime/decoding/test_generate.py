from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step35_trt.errors import DoesNotFitError, Step35Error, UsageError, VerificationError
from step35_trt.runtime.decoding.calls import run
from step35_trt.runtime.decoding.generate import generate
from step35_trt.runtime.decoding.generation import Generation
from step35_trt.runtime.decoding.generation_stats import GenerationStats
from step35_trt.runtime.decoding.sampling import SamplingParams
from step35_trt.runtime.session import rounds_of
from tests.cpu.runtime.fakes import DECODER, FakeModel, FakeSession, Scripted, flat, fresh_caches

GREEDY = SamplingParams()
DEPTHS: tuple[Any, ...] = (0, 1, 2, 3, "auto")


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocabulary=st.integers(2, 9),
    modules=st.integers(0, 3),
    noise=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    levels=st.sampled_from([None, 2]),
    prompt_length=st.integers(1, 25),
    chunk=st.integers(1, 9),
    max_tokens=st.integers(1, 40),
    context=st.sampled_from([30, 4096]),
    whole=st.booleans(),
)
def test_greedy_output_is_the_decoders_whatever_is_drafted(
    seed: int,
    vocabulary: int,
    modules: int,
    noise: float,
    levels: int | None,
    prompt_length: int,
    chunk: int,
    max_tokens: int,
    context: int,
    whole: bool,
) -> None:
    model = FakeModel.drawn(seed, vocabulary=vocabulary, modules=modules, noise=noise, levels=levels)
    prompt = np.random.default_rng(seed).integers(0, vocabulary, prompt_length).tolist()
    expected = model.greedy(prompt, min(max_tokens, context - prompt_length))
    for draft_tokens in (*range(modules + 1), "auto"):
        session = FakeSession(model, max_tokens=context, prefill_chunk=chunk, whole=whole)
        stats = GenerationStats()
        parts = list(
            generate(
                session,
                prompt,
                GREEDY,
                max_tokens=max_tokens,
                draft_tokens=draft_tokens,
                stats=stats,
                clock=session.clock,
            )
        )
        assert flat(parts) == expected
        assert all(parts)
        assert stats.generated_tokens == len(expected)
        assert stats.finish_reason == "length"
        assert len(parts) == stats.rounds + 1


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    noise=st.sampled_from([0.0, 0.5, 5.0]),
    prompt_length=st.integers(1, 40),
    chunk=st.integers(4, 12),
    depths=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    rounds=st.integers(0, 40),
    whole=st.booleans(),
)
def test_wherever_it_is_interrupted_the_caches_are_those_of_a_fresh_sequence(
    seed: int, noise: float, prompt_length: int, chunk: int, depths: list[int], rounds: int, whole: bool
) -> None:
    session = FakeSession(FakeModel.drawn(seed, noise=noise), prefill_chunk=chunk, whole=whole)
    prompt = np.random.default_rng(seed).integers(0, 8, prompt_length).tolist()
    answer = generate(session, prompt, GREEDY, max_tokens=500, draft_tokens=Scripted(depths))
    tokens = prompt + [token for _ in range(rounds + 1) for token in next(answer)]
    answer.close()  # type: ignore[attr-defined]
    (sequence,) = session.opened
    assert sequence.length == len(tokens) - 1
    fresh = fresh_caches(session, tokens, [sequence.draft_length(k) for k in range(3)])
    assert sequence.decoder.content == fresh.decoder.content
    for mine, theirs in zip(sequence.modules, fresh.modules, strict=True):
        assert mine.content == theirs.content


@pytest.mark.parametrize("draft_tokens", DEPTHS)
def test_a_seed_repeats_the_answer_however_long_the_rounds_take(draft_tokens: Any) -> None:
    model, answers = FakeModel.drawn(5), []
    for seed, speed in ((7, 1.0), (7, 50.0), (8, 1.0)):
        session = FakeSession(model, draft_seconds=speed)
        params = SamplingParams(temperature=1.0, top_p=0.9, seed=seed)
        answers.append(
            flat(
                generate(session, [1], params, max_tokens=300, draft_tokens=draft_tokens, clock=session.clock)
            )
        )
    assert answers[0] == answers[1] != answers[2]


def test_without_a_seed_answers_differ() -> None:
    session = FakeSession(FakeModel.drawn(5))
    one, two = (
        flat(generate(session, [1], SamplingParams(temperature=1.0), max_tokens=100)) for _ in range(2)
    )
    assert one != two


@pytest.mark.parametrize("draft_tokens", DEPTHS)
def test_a_stop_id_ends_the_answer_wherever_it_falls(draft_tokens: Any) -> None:
    model = FakeModel.drawn(1, noise=0.0, vocabulary=40)  # all drafts hit: stops fall inside accepted runs
    said = model.greedy([2, 3], 12)
    assert len(set(said)) == 12
    for place, stop in enumerate(said):
        stats = GenerationStats()
        session = FakeSession(model)
        parts = generate(
            session,
            [2, 3],
            GREEDY,
            max_tokens=50,
            stop_ids=(stop, 39),
            draft_tokens=draft_tokens,
            stats=stats,
        )
        assert flat(parts) == said[:place]
        assert (stats.generated_tokens, stats.finish_reason) == (place, "stop")


@pytest.mark.parametrize("draft_tokens", DEPTHS)
def test_max_tokens_and_the_context_end_the_answer_wherever_they_fall(draft_tokens: Any) -> None:
    model = FakeModel.drawn(1, noise=0.0)
    said = model.greedy([2, 3], 20)
    for limit in range(1, 15):
        for arguments in ({"max_tokens": limit}, {"max_tokens": 100, "context": limit + 2}):
            session = FakeSession(model, max_tokens=arguments.get("context", 4096))
            stats = GenerationStats()
            parts = generate(
                session,
                [2, 3],
                GREEDY,
                max_tokens=arguments["max_tokens"],
                draft_tokens=draft_tokens,
                stats=stats,
            )
            assert flat(parts) == said[:limit]
            assert (stats.generated_tokens, stats.finish_reason) == (limit, "length")
            assert all(
                drafted >= accepted for drafted, accepted in zip(stats.drafted, stats.accepted, strict=True)
            )


def test_a_stop_id_beyond_the_last_token_is_not_looked_for() -> None:
    model = FakeModel.drawn(1, noise=0.0, vocabulary=40)
    said = model.greedy([2, 3], 8)
    for limit, reason in ((6, "length"), (7, "length"), (8, "stop")):
        stats = GenerationStats()
        list(generate(FakeSession(model), [2, 3], GREEDY, max_tokens=limit, stop_ids=said[7:], stats=stats))
        assert (stats.generated_tokens, stats.finish_reason) == (min(limit, 7), reason)


def test_without_drafts_the_modules_never_run() -> None:
    session = FakeSession(FakeModel.drawn(1), prefill_chunk=4)
    list(generate(session, [1] * 11, GREEDY, max_tokens=9, draft_tokens=0))
    assert {who for who, _, _ in session.opened[0].calls} == {DECODER}


def test_only_the_modules_that_draft_are_run() -> None:
    session = FakeSession(FakeModel.drawn(1), prefill_chunk=4)
    list(generate(session, [1] * 11, GREEDY, max_tokens=9, draft_tokens=2))
    assert {who for who, _, _ in session.opened[0].calls} == {DECODER, 0, 1}


def test_the_prompt_is_prefilled_in_chunks_and_asks_for_one_row_of_logits() -> None:
    session = FakeSession(FakeModel.drawn(1), prefill_chunk=8)
    answer = generate(session, [1, 2, 3, 4, 5] * 4, GREEDY, max_tokens=9)
    next(answer)
    (sequence,) = session.opened
    # The first token does not wait for the modules to take the last chunk.
    assert [sequence.draft_length(module) for module in range(3)] == [8, 8, 8]
    assert [call[1:] for call in sequence.calls if call[0] == DECODER] == [(8, 0), (8, 0), (4, 1)]
    calls = len(sequence.calls)
    next(answer)
    after = sequence.calls[calls:]
    assert after[:3] == [(0, 8, 0), (1, 8, 0), (2, 8, 0)]
    assert all(rows <= 4 for who, rows, _ in after[3:] if who != DECODER)


@pytest.mark.parametrize(
    ("prompt", "arguments", "error", "words"),
    [
        ([], {}, UsageError, "prompt is empty"),
        ([1, 8], {}, UsageError, "Token id 8 lies outside the vocabulary of 8"),
        ([-1], {}, UsageError, "Token id -1"),
        ([1.5], {}, UsageError, "whole token ids"),
        ([[1, 2]], {}, UsageError, "flat list"),
        (["a"], {}, UsageError, "whole token ids"),
        ([1] * 65, {}, DoesNotFitError, "65 tokens leaves no room to answer in a context of 64"),
        ([1] * 64, {}, DoesNotFitError, "64 tokens"),
        ([1], {"draft_tokens": 4}, UsageError, "from 0 to 3"),
        ([1], {"draft_tokens": -1}, UsageError, "not -1"),
        ([1], {"draft_tokens": "many"}, UsageError, "not 'many'"),
        ([1], {"draft_tokens": True}, UsageError, "not True"),
        ([1], {"max_tokens": 0}, UsageError, "max_tokens"),
        ([1], {"max_tokens": 1.5}, UsageError, "max_tokens"),
    ],
)
def test_a_wrong_argument_is_one_sentence_before_anything_runs(
    prompt: Any, arguments: dict[str, Any], error: type[Step35Error], words: str
) -> None:
    session = FakeSession(FakeModel.drawn(1), max_tokens=64)
    with pytest.raises(error, match=words) as caught:
        generate(session, prompt, GREEDY, **{"max_tokens": 5, **arguments})
    assert "\n" not in caught.value.message
    assert not session.opened


@pytest.mark.parametrize("prompt", [(1, 2), np.array([1, 2]), np.array([1, 2], dtype=np.uint16)])
def test_a_prompt_may_be_any_row_of_ids(prompt: Any) -> None:
    model = FakeModel.drawn(1)
    assert flat(generate(FakeSession(model), prompt, GREEDY, max_tokens=5)) == model.greedy([1, 2], 5)


@pytest.mark.parametrize(("temperature", "whole"), [(0.0, False), (1.0, False), (0.0, True)])
@pytest.mark.parametrize("broken", ["decoder", "heads"])
def test_logits_that_are_not_finite_end_the_answer_with_one_sentence(
    broken: str, temperature: float, whole: bool
) -> None:
    model = FakeModel.drawn(1)
    getattr(model, broken)[..., 3] = math.nan
    session = FakeSession(model, whole=whole)
    with pytest.raises(VerificationError, match="not finite"):
        list(
            generate(
                session, [1, 2], SamplingParams(temperature=temperature, seed=1), max_tokens=5, draft_tokens=2
            )
        )


def test_closing_an_answer_leaves_the_session_usable() -> None:
    model = FakeModel.drawn(2)
    session = FakeSession(model, prefill_chunk=4)
    for rounds in range(6):
        stats = GenerationStats()
        answer = generate(session, [1] * 9, GREEDY, max_tokens=100, stats=stats)
        for _ in range(rounds):
            next(answer)
        answer.close()  # type: ignore[attr-defined]
        assert stats.finish_reason is None
    assert flat(generate(session, [1] * 9, GREEDY, max_tokens=30)) == model.greedy([1] * 9, 30)


def finish(session: FakeSession, turns: list[Generation], pick: Any) -> list[list[int]]:
    """Run generations as a scheduler may: one picked call at a time, some of them in parts."""
    said: list[list[int]] = [[] for _ in turns]
    coroutines = [turn.calls() for turn in turns]
    needed = [next(calls) for calls in coroutines]
    while open_turns := [i for i, turn in enumerate(turns) if not turn.finished]:
        i = open_turns[pick(len(open_turns))]
        call = needed[i]
        if call.divisible:
            call = call.first(1 + pick(len(call)))
        step = run(session, rounds_of(session), call)
        try:
            needed[i] = coroutines[i].send(step)
        except StopIteration:
            assert turns[i].finished
        said[i] += turns[i].take()
    assert all(sequence.closed for sequence in session.opened)
    return said


PAIR = ([1, 2, 3, 4, 5, 6, 7], [7])


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 1000), depth=st.sampled_from(DEPTHS), chunk=st.integers(4, 9), whole=st.booleans())
def test_generations_can_take_turns_and_have_their_prompts_cut(
    seed: int, depth: Any, chunk: int, whole: bool
) -> None:
    model, rng = FakeModel.drawn(4), np.random.default_rng(seed)
    session = FakeSession(model, prefill_chunk=chunk, whole=whole)
    turns = [Generation(session, prompt, GREEDY, max_tokens=40, draft_tokens=depth) for prompt in PAIR]
    said = finish(session, turns, lambda count: int(rng.integers(count)))
    assert said == [model.greedy(prompt, 40) for prompt in PAIR]


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 1000),
    depth=st.sampled_from(DEPTHS),
    temperature=st.sampled_from([0.0, 1.0]),
    whole=st.booleans(),
)
def test_an_answer_goes_on_with_another_sequence_as_if_nothing_had_happened(
    seed: int, depth: Any, temperature: float, whole: bool
) -> None:
    model, rng = FakeModel.drawn(4), np.random.default_rng(seed)
    session = FakeSession(model, prefill_chunk=16, whole=whole)
    params = SamplingParams(temperature=temperature, seed=seed)
    expected = flat(generate(session, PAIR[0], params, max_tokens=40, draft_tokens=depth))
    generation = Generation(session, PAIR[0], params, max_tokens=40, draft_tokens=depth)
    said: list[int] = []
    while not generation.finished:
        calls = generation.calls()
        needed = next(calls)
        with suppress(StopIteration):
            for _ in range(int(rng.integers(1, 60))):
                needed = calls.send(run(session, rounds_of(session), needed))
        calls.close()
        said += generation.take()
    assert said == expected
    assert generation.stats.generated_tokens == 40
    assert all(sequence.closed for sequence in session.opened)
