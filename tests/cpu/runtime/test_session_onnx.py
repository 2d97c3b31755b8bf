"""The CPU session: sequences that share steps, pages and prefixes get what each gets alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from step35_trt.errors import DoesNotFitError
from step35_trt.runtime.kv_pages import PAGE_ROWS, pages_for
from step35_trt.runtime.session import Call
from tests.cpu.conftest import GEOMETRIES
from tests.cpu.dialects.test_torch import relative
from tests.engines import engine

if TYPE_CHECKING:
    from pathlib import Path

    from step35_trt.runtime.session_onnx import OnnxSequence, OnnxSession

LENGTH = 230  # three pages and more, many windows of either geometry
SHARED = 2 * PAGE_ROWS + 2  # tokens that all streams begin with: what module 1 sees from the second page
STREAMS = 3
MODULES = 3
NONE = np.empty(0, np.int64)


def small(session: OnnxSession, sequences: int) -> OnnxSession:
    """The bundle over caches of its own for `sequences` sequences, with NaN wherever nothing was written."""
    rows = sequences * pages_for(LENGTH + 10) * PAGE_ROWS
    made = replace(session, max_tokens=LENGTH + 10, cache_tokens=rows, _loaded={})
    for module in range(-1, MODULES):
        for array in made.graph(module)._pages.values():
            array.fill(np.nan)
    return made


@dataclass(frozen=True)
class Alone:
    """A stream's tokens and what the decoder and then the modules make of them, each in one call."""

    ids: np.ndarray
    logits: list[np.ndarray]
    hidden: list[np.ndarray]

    @classmethod
    def of(cls, session: OnnxSession, ids: np.ndarray) -> Alone:
        sequence = session.open()
        step = sequence.decode(ids, np.arange(len(ids)))
        logits, hidden = [step.logits], [step.hidden]
        for module in range(MODULES):
            taken = ids[module + 1 :]
            step = sequence.draft(module, taken, hidden[-1][: len(taken)], np.arange(len(taken)))
            logits.append(step.logits)
            hidden.append(step.hidden)
        return cls(ids, logits, hidden)


@pytest.fixture(scope="module")
def bundles(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of each geometry a session and its streams."""
    root, made = tmp_path_factory.mktemp("bundles"), {}
    for name, checkpoint in checkpoints.items():
        session: Any = engine(checkpoint, root / name)
        rng = np.random.default_rng(7)
        vocabulary = session.config.vocab_size
        common = rng.integers(0, vocabulary, SHARED)
        streams = [np.append(common, rng.integers(0, vocabulary, LENGTH - SHARED)) for _ in range(STREAMS)]
        made[name] = session, [Alone.of(session, ids) for ids in streams]
    return made


@dataclass
class Running:
    """A sequence and the stream it follows."""

    sequence: OnnxSequence
    stream: Alone
    modules: int  # that run on it
    junk: dict[int, int] = field(default_factory=dict)

    def length(self, module: int) -> int:
        return self.sequence.length if module < 0 else self.sequence.draft_length(module)

    def ready(self, module: int) -> int:
        """Rows that could be appended: of a module as far as the one before it is."""
        have = self.length(module)
        if module < 0:
            return LENGTH - have
        before = self.length(module - 1) if module else self.sequence.length
        return max(min(before, LENGTH - 1 - module) - have, 0) if module < self.modules else 0

    def call(self, module: int, size: int, junk: int) -> Call:
        """The next `size` tokens, and some that will be taken back."""
        first, ids = self.length(module), self.stream.ids[module + 1 :]
        taken = np.append(ids[first : first + size], np.arange(junk))
        self.junk[module] = junk
        if module < 0:
            return Call(self.sequence, taken, np.arange(size))
        hidden = self.stream.hidden[module][first : first + size]
        wrong = np.ones((junk, hidden.shape[1]), np.float32)
        return Call(self.sequence, taken, np.arange(size), np.concatenate([hidden, wrong]))

    def check(self, module: int, call: Call, step: Any) -> None:
        size = len(call.rows)
        end = self.length(module) - self.junk[module]
        (self.sequence.truncate if module < 0 else _truncate(self.sequence, module))(end)
        assert self.length(module) == end
        assert relative(step.logits, self.stream.logits[module + 1][end - size : end]) < 1e-4
        assert relative(step.hidden[:size], self.stream.hidden[module + 1][end - size : end]) < 1e-4


def _truncate(sequence: OnnxSequence, module: int) -> Any:
    return lambda length: sequence.truncate_draft(module, length)


def step(session: OnnxSession, module: int, calls: list[Call]) -> Any:
    return session.decode(calls) if module < 0 else session.draft(module, calls)


@pytest.mark.parametrize("geometry", list(GEOMETRIES))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_interleaving_gives_each_sequence_what_it_gets_alone(
    bundles: dict[str, Any], geometry: str, data: st.DataObject
) -> None:
    """Prefill in chunks, decoding, drafts refused, modules, closing, prefixes, evictions, full caches."""
    whole, streams = bundles[geometry]
    session = small(whole, data.draw(st.integers(2, 3), "room"))
    running: list[Running] = []
    for _ in range(data.draw(st.integers(5, 25), "steps")):
        if running and data.draw(st.integers(0, 5)) == 0:
            running.pop(data.draw(st.integers(0, len(running) - 1))).sequence.close()
        if len(running) < 4 and data.draw(st.booleans()):
            stream = data.draw(st.sampled_from(streams))
            modules = data.draw(st.integers(0, MODULES), "modules")
            prompt = data.draw(st.sampled_from([None, 60, 64 + modules, 128 + modules, LENGTH - 5]))
            given_ids = None if prompt is None else stream.ids[:prompt]
            running.append(Running(session.open(given_ids, modules), stream, modules))
            begun = running[-1].sequence.length
            assert begun % PAGE_ROWS == 0
            assert begun == 0 or begun + max(modules, 1) <= (prompt or 0)
            assert all(running[-1].length(module) == begun for module in range(modules))
        module = data.draw(st.integers(-1, MODULES - 1), "module")
        able = [one for one in running if one.ready(module)]
        chosen = [one for one in able if data.draw(st.booleans())] or able[:1]
        sizes = st.one_of(st.just(1), st.integers(1, 4), st.integers(1, 100))
        calls = [
            one.call(module, min(data.draw(sizes), one.ready(module)), data.draw(st.integers(0, 3)))
            for one in chosen
        ]
        if not calls:
            continue
        before = [one.length(module) for one in chosen]
        try:
            steps = step(session, module, calls)
        except DoesNotFitError:
            wanted = sum(len(call.token_ids) + PAGE_ROWS for call in calls)
            assert session.capacity.rows < wanted
            assert [one.length(module) for one in chosen] == before
            running.pop().sequence.close()
            continue
        for one, call, result in zip(chosen, calls, steps, strict=True):
            one.check(module, call, result)
    for one in running:
        one.sequence.close()
    assert session.capacity == replace(session, _loaded={}).capacity


def follow(one: Running, upto: int) -> None:
    """Decoder and modules, as far as each can, in chunks."""
    for module in range(-1, one.modules):
        while one.length(module) < upto and one.ready(module):
            call = one.call(module, min(50, one.ready(module), upto - one.length(module)), 0)
            one.check(module, call, step(one.sequence.session, module, [call])[0])


@pytest.mark.parametrize("geometry", list(GEOMETRIES))
def test_a_finished_sequence_leaves_its_prefix(bundles: dict[str, Any], geometry: str) -> None:
    whole, streams = bundles[geometry]
    session = small(whole, 4)
    first = Running(session.open(), streams[0], 2)
    follow(first, LENGTH)
    running = session.capacity
    # What runs can be shared as well, except what may still be taken back.
    assert session.open(streams[1].ids, 2).length == SHARED // PAGE_ROWS * PAGE_ROWS
    assert session.open(streams[0].ids[: 128 + 1], 0).length == 128
    assert session.open(streams[0].ids[:128], 0).length == 64  # one token of a prompt has to run
    assert session.open(streams[0].ids[:130], 2).length == 128  # module 1 looks two tokens ahead
    assert session.open(streams[0].ids[:129], 2).length == 64
    assert session.open(streams[0].ids, 3).length == 0  # module 2 never ran
    assert session.capacity == running
    first.sequence.close()
    assert session.capacity.rows > running.rows
    again = Running(session.open(streams[0].ids[:-1], 2), streams[0], 2)
    assert again.sequence.length == 192
    follow(again, LENGTH)
    other = Running(session.open(streams[2].ids, 1), streams[2], 1)
    assert other.sequence.length == 128
    follow(other, LENGTH)


def test_pages_are_shared_as_far_as_modules_look_ahead(bundles: dict[str, Any]) -> None:
    whole, streams = bundles["small-window"]
    session = small(whole, 4)
    one = Running(session.open(), streams[0], MODULES)
    follow(one, LENGTH)
    found = [session.open(streams[1].ids, modules).length for modules in range(MODULES + 1)]
    assert found == [128, 128, 128, 64]


def test_prefixes_go_when_room_is_needed(bundles: dict[str, Any]) -> None:
    whole, streams = bundles["large-window"]
    session = small(whole, 2)
    one = Running(session.open(), streams[0], 0)
    follow(one, LENGTH)
    one.sequence.close()
    room = session.capacity.rows
    filler = session.open()
    filler.decode(np.zeros(LENGTH, np.int64), NONE)
    assert session.open(streams[0].ids, 0).length == 192  # beside it there was room
    more = session.open()
    more.decode(np.ones(PAGE_ROWS + 1, np.int64), NONE)
    assert session.open(streams[0].ids, 0).length < 192
    assert session.capacity.rows == room - session.capacity.rows_for(LENGTH) - 2 * PAGE_ROWS
    with pytest.raises(DoesNotFitError, match="more rows are needed"):
        session.open().decode(np.ones(3 * PAGE_ROWS, np.int64), NONE)


def test_a_module_that_took_other_tokens_is_not_reused(bundles: dict[str, Any]) -> None:
    whole, streams = bundles["small-window"]
    session = small(whole, 2)
    one = Running(session.open(), streams[0], 1)
    wrong = streams[0].ids[1:101].copy()
    wrong[3] = (wrong[3] + 1) % session.config.vocab_size
    follow(one, -1)
    one.sequence.decode(streams[0].ids[:120], NONE)
    one.sequence.draft(0, wrong, streams[0].hidden[0][:100], NONE)
    one.sequence.close()
    assert session.open(streams[0].ids, 0).length == 64
    assert session.open(streams[0].ids, 1).length == 0


def test_windows_give_pages_back(bundles: dict[str, Any]) -> None:
    whole, streams = bundles["small-window"]
    session = small(whole, 2)
    sequence = session.open()
    sequence.decode(streams[0].ids, NONE)
    pools = session.graph(-1).pools
    assert pools["full"].held == 4
    assert pools["window"].held == 1
    sequence.truncate(LENGTH - 8)
    with pytest.raises(AssertionError, match="taken back"):
        sequence.truncate(100)
    del sequence
    assert pools["full"].held == pools["window"].held == 0


def test_a_closed_sequence_cannot_run(bundles: dict[str, Any]) -> None:
    sequence = small(bundles["small-window"][0], 1).open()
    sequence.decode(np.arange(5), NONE)
    sequence.close()
    sequence.close()
    with pytest.raises(AssertionError, match="closed"):
        sequence.decode(np.arange(5), NONE)


def test_a_step_takes_all_or_nothing(bundles: dict[str, Any]) -> None:
    """One call too long for the context, or for what is free: the other call's sequence is as before."""
    session = small(bundles["small-window"][0], 1)
    fits, passes = session.open(), session.open()
    fits.decode(np.arange(5), NONE)
    for size in (LENGTH + 11, LENGTH - 30):
        calls = [Call(fits, np.arange(3), NONE), Call(passes, np.zeros(size, np.int64), NONE)]
        with pytest.raises(DoesNotFitError):
            session.decode(calls)
        assert (fits.length, passes.length) == (5, 0)
    assert fits.decode(np.arange(3), NONE).hidden.shape[0] == 3
