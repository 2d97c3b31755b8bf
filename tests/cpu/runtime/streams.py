"""Token streams that sequences of a session follow, in any interleaving, against what each gets alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import strategies as st

from step35_trt.errors import DoesNotFitError
from step35_trt.runtime.session import Call
from tests.cpu.dialects.test_torch import relative

if TYPE_CHECKING:
    from collections.abc import Callable

    from hypothesis.strategies import DataObject

    from step35_trt.runtime.session import Session

MODULES = 3


@dataclass(frozen=True)
class Stream:
    """Tokens and what the decoder and then the modules make of them, each in one call."""

    ids: np.ndarray
    logits: list[np.ndarray]
    hidden: list[np.ndarray]

    @classmethod
    def of(cls, session: Session, ids: np.ndarray) -> Stream:
        sequence = session.open()
        step = sequence.decode(ids, np.arange(len(ids)))
        logits, hidden = [step.logits], [step.hidden]
        for module in range(MODULES):
            taken = ids[module + 1 :]
            step = sequence.draft(module, taken, hidden[-1][: len(taken)], np.arange(len(taken)))
            logits.append(step.logits)
            hidden.append(step.hidden)
        return cls(ids, logits, hidden)

    @classmethod
    def several(cls, session: Session, count: int, length: int, shared: int) -> list[Stream]:
        """Streams that begin with the same `shared` tokens."""
        rng, vocabulary = np.random.default_rng(7), session.config.vocab_size
        common = rng.integers(0, vocabulary, shared)
        tails = [rng.integers(0, vocabulary, length - shared) for _ in range(count)]
        return [cls.of(session, np.append(common, tail)) for tail in tails]


@dataclass
class Running:
    """A sequence and the stream it follows."""

    sequence: Any
    stream: Stream
    modules: int  # that run on it
    junk: dict[int, int] = field(default_factory=dict)

    def length(self, module: int) -> int:
        length: int = self.sequence.length if module < 0 else self.sequence.draft_length(module)
        return length

    def ready(self, module: int) -> int:
        """Rows that could be appended: of a module as far as the one before it is."""
        have, most = self.length(module), len(self.stream.ids)
        if module < 0:
            return most - have
        before = self.length(module - 1) if module else self.sequence.length
        return max(min(before, most - 1 - module) - have, 0) if module < self.modules else 0

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
        """Take back what is wrong; the rest is what the stream gets alone."""
        size = len(call.rows)
        end = self.length(module) - self.junk[module]
        if module < 0:
            self.sequence.truncate(end)
        else:
            self.sequence.truncate_draft(module, end)
        assert self.length(module) == end
        assert relative(step.logits, self.stream.logits[module + 1][end - size : end]) < 1e-4
        assert relative(step.hidden[:size], self.stream.hidden[module + 1][end - size : end]) < 1e-4

    def follow(self, upto: int) -> int:
        """Decoder and modules, as far as each can, in chunks; how many tokens were computed."""
        computed = 0
        for module in range(-1, self.modules):
            while self.length(module) < upto and self.ready(module):
                size = min(50, self.ready(module), upto - self.length(module))
                call = self.call(module, size, 0)
                self.check(module, call, step(self.sequence.session, module, [call])[0])
                computed += size
        return computed


def step(session: Session, module: int, calls: list[Call]) -> Any:
    """One of the decoder, which is module -1, or of a module."""
    return session.decode(calls) if module < 0 else session.draft(module, calls)


def interleave(
    data: DataObject,
    session: Session,
    streams: list[Stream],
    page: int,
    largest: int,
    watch: Callable[[list[Running]], None] = lambda _: None,
) -> None:
    """Prefill in chunks, decoding, drafts refused, modules, closing, prefixes, evictions, full caches.

    Args:
        data: Draws what happens.
        session: Has no open sequence, and none is left.
        streams: All of the same length.
        page: Rows of a page.
        largest: Tokens of one call, those that are taken back not counted.
        watch: Looks at the running sequences after each step.
    """
    running: list[Running] = []
    length = len(streams[0].ids)
    for _ in range(data.draw(st.integers(5, 25), "steps")):
        if running and data.draw(st.integers(0, 5)) == 0:
            running.pop(data.draw(st.integers(0, len(running) - 1))).sequence.close()
        if len(running) < 4 and data.draw(st.booleans()):
            stream = data.draw(st.sampled_from(streams))
            modules = data.draw(st.integers(0, MODULES), "modules")
            lengths = [None, page - 4, page + modules, 2 * page + modules, length - 5]
            prompt = data.draw(st.sampled_from(lengths))
            given_ids = None if prompt is None else stream.ids[:prompt]
            running.append(Running(session.open(given_ids, modules), stream, modules))
            begun = running[-1].sequence.length
            assert begun % page == 0
            assert begun == 0 or begun + max(modules, 1) <= (prompt or 0)
            assert all(running[-1].length(module) == begun for module in range(modules))
        module = data.draw(st.integers(-1, MODULES - 1), "module")
        able = [one for one in running if one.ready(module)]
        chosen = [one for one in able if data.draw(st.booleans())] or able[:1]
        sizes = st.one_of(st.just(1), st.integers(1, 4), st.integers(1, largest))
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
            wanted = sum(len(call.token_ids) + page for call in calls)
            assert session.capacity.rows < wanted
            assert [one.length(module) for one in chosen] == before
            running.pop().sequence.close()
            continue
        watch(running)
        for one, call, result in zip(chosen, calls, steps, strict=True):
            one.check(module, call, result)
    for one in running:
        one.sequence.close()
