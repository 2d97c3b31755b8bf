from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step35_trt.runtime.decoding.calls import run
from step35_trt.runtime.decoding.drafting import SHORT, DraftChain, Proposal
from step35_trt.runtime.decoding.sampling import SamplingParams, greedy, probabilities
from tests.cpu.runtime.fakes import DECODER, FakeModel, FakeSequence, FakeSession, fresh_caches

if TYPE_CHECKING:
    from step35_trt.runtime.decoding.calls import Calls

GREEDY = SamplingParams()
MODELS = {modules: FakeModel.drawn(modules, modules=modules) for modules in (1, 2, 3)}


def ids(tokens: Any) -> Any:
    return np.array(tokens, dtype=np.int64)


def finish(session: Any, calls: Any) -> Any:
    """Run a coroutine's calls by themselves; what it returns."""
    try:
        needed = next(calls)
        while True:
            needed = calls.send(run(session, None, needed))
    except StopIteration as end:
        return end.value


class Driver:
    """Plays decoder and verifier by decree: which drafts turn out right is the test's decision."""

    def __init__(self, modules: int, chunk: int, seed: int = 0) -> None:
        self.session = FakeSession(MODELS[modules], prefill_chunk=chunk)
        self.sequence: FakeSequence = self.session.open()
        self.chain = DraftChain(self.sequence, modules, chunk)
        self.modules, self.chunk = modules, chunk
        self.tokens: list[int] = []
        self.rng = np.random.default_rng(seed)

    def run(self, calls: Any) -> Any:
        return finish(self.session, calls)

    def other(self, *excluded: int) -> int:
        return int(self.rng.choice([token for token in range(8) if token not in excluded]))

    def prefill(self, length: int) -> None:
        self.tokens = [self.other() for _ in range(length)]
        for first in range(0, length, self.chunk):
            part = ids(self.tokens[first : min(first + self.chunk, length)])
            step = self.sequence.decode(part, ids([]))
            if first + len(part) == length:
                self.tokens.append(self.other())
            self.run(self.chain.observe(step.hidden, self.tokens))
            self.run(self.chain.catch_up(self.modules, self.tokens))

    def round(self, depth: int, accepted: int, params: SamplingParams = GREEDY) -> None:
        proposal = self.run(self.chain.propose(depth, self.tokens, params, self.rng))
        drafts = proposal.token_ids
        step = self.sequence.decode(ids([self.tokens[-1], *drafts]), ids([]))
        accepted = min(accepted, depth)
        self.sequence.truncate(self.sequence.length - (depth - accepted))
        self.chain.settle(accepted)
        self.tokens += [*drafts[:accepted], self.other(*drafts[accepted : accepted + 1])]
        self.run(self.chain.observe(step.hidden[: accepted + 1], self.tokens))

    def check(self) -> None:
        """All caches are what a sequence that never saw a refused draft would hold."""
        lengths = [self.sequence.draft_length(module) for module in range(self.modules)]
        fresh = fresh_caches(self.session, self.tokens, lengths)
        assert self.sequence.decoder.content == fresh.decoder.content
        for mine, theirs in zip(self.sequence.modules, fresh.modules, strict=True):
            assert mine.content == theirs.content


GEOMETRIES = st.integers(1, 3).flatmap(
    lambda modules: st.tuples(st.just(modules), st.integers(modules + 1, 9))
)


@settings(max_examples=150, deadline=None)
@given(
    geometry=GEOMETRIES,
    prompt=st.integers(1, 30),
    history=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=40),
    temperature=st.sampled_from([0.0, 1.0]),
)
def test_after_any_history_the_caches_are_those_of_a_fresh_sequence(
    geometry: tuple[int, int], prompt: int, history: list[tuple[int, int]], temperature: float
) -> None:
    modules, chunk = geometry
    driver = Driver(modules, chunk)
    driver.prefill(prompt)
    for depth, accepted in history:
        driver.round(min(depth, modules), accepted, SamplingParams(temperature=temperature))
        driver.check()
        # What waits is bounded by the chunk, however long nobody drafts.
        assert driver.chain.pending_rows <= modules * (2 * chunk + modules + 1)
    driver.round(modules, 0)
    assert [driver.sequence.draft_length(k) for k in range(modules)] == [
        max(driver.sequence.length - 1 - k, 0) for k in range(modules)
    ]
    driver.check()


@pytest.mark.parametrize("accepted", [0, 1, 2, 3])
def test_the_rows_a_refusal_undoes(accepted: int) -> None:
    driver = Driver(3, 16)
    driver.prefill(10)
    driver.round(3, accepted)
    # Row p of module k took token p+1+k; tokens up to 10 + accepted are true, and there was no row after 9.
    assert [driver.sequence.draft_length(k) for k in range(3)] == [
        min(10, 10 + accepted - k) for k in range(3)
    ]


def test_the_steady_state_is_one_short_call_a_module() -> None:
    driver = Driver(3, 16)
    driver.prefill(40)
    driver.round(3, 3)
    for accepted in (0, 3, 1, 2, 0, 0, 3, 3):
        driver.sequence.calls.clear()
        driver.round(3, accepted)
        assert [who for who, _, _ in driver.sequence.calls] == [0, 1, 2, DECODER]
        assert all(rows <= 4 for _, rows, _ in driver.sequence.calls)
        assert all(wanted == 1 for who, _, wanted in driver.sequence.calls if who != DECODER)


def test_the_prompt_is_run_by_the_modules_chunk_by_chunk() -> None:
    driver = Driver(3, 8)
    driver.prefill(64)
    # Together with the decoder, not afterwards, although modules 1 and 2 look into the next chunk.
    decoder_calls = [i for i, (who, _, _) in enumerate(driver.sequence.calls) if who == DECODER]
    for module in range(3):
        first = next(i for i, (who, _, _) in enumerate(driver.sequence.calls) if who == module)
        assert first < decoder_calls[2]
        assert driver.sequence.draft_length(module) >= 63 - module - SHORT
    assert driver.chain.pending_rows <= 3 * (SHORT + 1)


def test_modules_that_do_not_draft_fall_behind_and_catch_up_in_chunks() -> None:
    driver = Driver(3, 16)
    driver.prefill(20)
    driver.sequence.calls.clear()
    for _ in range(7):
        driver.round(0, 0)
    assert all(who == DECODER for who, _, _ in driver.sequence.calls)
    for _ in range(195):
        driver.round(0, 0)
    calls = [rows for who, rows, _ in driver.sequence.calls if who != DECODER]
    assert calls
    assert all(rows == 16 for rows in calls)
    driver.sequence.calls.clear()
    driver.run(driver.chain.catch_up(2, driver.tokens))
    assert {who for who, _, _ in driver.sequence.calls} == {0, 1}
    driver.sequence.calls.clear()
    driver.round(2, 1)
    assert [who for who, _, _ in driver.sequence.calls] == [0, 1, DECODER]
    driver.check()


def test_nothing_is_kept_or_run_without_modules() -> None:
    session = FakeSession(MODELS[3])
    sequence = session.open()
    chain = DraftChain(sequence, 0, 512)
    finish(session, chain.observe(sequence.decode(ids([1, 2, 3]), ids([])).hidden, [1, 2, 3, 4]))
    finish(session, chain.catch_up(0, [1, 2, 3, 4]))
    proposal = finish(session, chain.propose(0, [1, 2, 3, 4], GREEDY, np.random.default_rng(0)))
    chain.settle(0)
    assert proposal.token_ids == proposal.weights == ()
    assert chain.pending_rows == 0
    assert [who for who, _, _ in sequence.calls] == [DECODER]


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=0.7, top_k=3)])
def test_drafts_come_from_each_modules_own_filtered_distribution(
    params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(3, 16)
    driver.prefill(12)
    proposals: list[tuple[Any, Proposal]] = []
    propose = driver.chain.propose

    def watched(depth: int, tokens: Any, *rest: Any) -> Calls[Proposal]:
        newest = tokens[-2:]
        proposal = yield from propose(depth, tokens, *rest)
        proposals.append((newest, proposal))
        return proposal

    monkeypatch.setattr(driver.chain, "propose", watched)
    likeliest = 0
    for accepted in [0, 1, 2, 3] * 15:
        driver.round(3, accepted, params)
    for newest, proposal in proposals:
        context = [*newest, *proposal.token_ids]
        assert len(proposal.weights) == (0 if params.greedy else 3)
        for module, token in enumerate(proposal.token_ids):
            row = MODELS[3].heads[module][context[module], context[module + 1]][None]
            likeliest += int(token == greedy(row)[0])
            if not params.greedy:
                np.testing.assert_array_equal(proposal.weights[module], probabilities(row, params)[0])
                assert proposal.weights[module][token] > 0
    assert likeliest == 180 if params.greedy else 60 < likeliest < 160


def test_observing_before_settling_is_refused() -> None:
    driver = Driver(2, 16)
    driver.prefill(4)
    driver.run(driver.chain.propose(2, driver.tokens, GREEDY, driver.rng))
    with pytest.raises(RuntimeError, match="settle"):
        driver.run(driver.chain.observe(np.zeros((1, 4), dtype=np.float32), driver.tokens))
