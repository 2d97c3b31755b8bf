"""The chain of MTP modules (specification section 3): what each row takes, and which rows a rejection undoes.

Let t_0 .. t_n be the known tokens and 0 .. n-1 the decoder's cached rows. Row p of module k takes token
t_{p+1+k} and row p of what module k-1 put out (module 0: of the decoder's hidden rows), and predicts
t_{p+2+k}. So row n-1 of the modules gives the drafts of t_{n+1}, t_{n+2}, ... one after the other, and the
last k rows of module k rest on drafts. If `a` of the drafts turn out right, its rows up to n-1+a-k stay; the
others are truncated and run again, with the true tokens, in the next round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from step35_trt.runtime.cache.hidden_rows import HiddenRows
from step35_trt.runtime.decoding.calls import ModelCall, step_of
from step35_trt.runtime.decoding.sampling import draw, greedy, probabilities
from step35_trt.runtime.session import Call

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from step35_trt.runtime.decoding.calls import Calls
    from step35_trt.runtime.decoding.sampling import SamplingParams, Weights
    from step35_trt.runtime.session import Floats, Ids, Sequence, Step

SHORT = 8  # rows that a drafting call takes along
_NO_ROWS = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Proposal:
    """Drafts of the tokens after the newest known one.

    Attributes:
        token_ids: K ids.
        weights: What each was drawn from, K rows `[V]` fp64; none when greedy.
    """

    token_ids: tuple[int, ...] = ()
    weights: tuple[Weights, ...] = ()


class DraftChain:
    """The MTP modules' side of one sequence.

    A module that is not used falls behind; the input rows it has not seen are kept, at most about a chunk of
    them, so each module's cache is complete whenever it drafts. Per round: `propose`, then the decoder runs,
    then `settle` and `observe`. What runs a module is a coroutine (`runtime/decoding/calls.py`).

    Args:
        sequence: The caches; where they are not empty, decoder and modules hold the same rows.
        modules: How many modules to keep fed; below `chunk`.
        chunk: Rows that one call takes at most.
    """

    def __init__(self, sequence: Sequence, modules: int, chunk: int) -> None:
        self._sequence = sequence
        self._modules = modules
        self._chunk = chunk
        self._rows = sequence.length  # decoder rows observed: n
        self._drafted = 0  # modules whose newest rows rest on drafts
        self._pending = tuple(HiddenRows(self._rows) for _ in range(modules))

    @property
    def pending_rows(self) -> int:
        """Hidden rows held back for all modules together."""
        return sum(len(rows) for rows in self._pending)

    def observe(self, hidden: Floats, tokens: SequenceOf[int]) -> Calls[None]:
        """Take the decoder's hidden rows `[T, D]` that follow those seen before.

        Args:
            hidden: Rows of true tokens only; those of refused drafts must not be passed.
            tokens: All known tokens of the sequence, prompt included.

        Raises:
            RuntimeError: drafts of `propose` are not settled.
        """
        if self._drafted:
            raise RuntimeError("settle the last proposal before observing new rows")
        if not self._modules:
            return
        self._pending[0].append(hidden)
        self._rows += len(hidden)
        for module in range(self._modules):  # what nobody uses now must not pile up
            while self._ready(module, tokens) >= self._chunk:
                yield from self._feed(module, tokens, self._chunk)

    def catch_up(self, depth: int, tokens: SequenceOf[int]) -> Calls[None]:
        """Run what modules 0 .. depth-1 have missed, so that their next drafting calls are short.

        Does nothing in the steady state, where each call takes at most `modules` + 1 rows anyway, and where
        the backlog is so short that a call of its own would cost more than the rows do.
        """
        furthest = min((self._sequence.draft_length(module) for module in range(depth)), default=self._rows)
        if self._rows - furthest <= min(max(self._modules + 1, SHORT), self._chunk):
            return
        for module in range(depth):
            while ready := self._ready(module, tokens):
                yield from self._feed(module, tokens, min(ready, self._chunk))

    def propose(
        self, depth: int, tokens: SequenceOf[int], params: SamplingParams, rng: np.random.Generator
    ) -> Calls[Proposal]:
        """Draft `depth` tokens, one module each.

        Args:
            depth: How many, at most `modules`.
            tokens: All known tokens, one more than the decoder has rows.
            params: Drafts are drawn under the same filters as the answer.
            rng: Source of the draws.
        """
        yield from self.catch_up(depth, tokens)
        drafts: list[int] = []
        weights: list[Weights] = []
        for module in range(depth):
            first = self._sequence.draft_length(module)
            # Counted from the end: row n-1 takes the newest draft (module 0: the newest token), n-2 the one
            # before. All rows that rest on drafts go into one call, as only the latest call's can be undone.
            ids = [*tokens[first + 1 :], *drafts][first - self._rows :]
            step = yield from self._run(module, ids, np.array([len(ids) - 1], dtype=np.int64))
            if params.greedy:
                drafts.append(int(greedy(step.logits)[0]))
            else:
                weights.append(probabilities(step.logits, params)[0])
                drafts.append(draw(weights[-1], rng))
        self._drafted = depth
        return Proposal(tuple(drafts), tuple(weights))

    def settle(self, accepted: int) -> None:
        """Truncate the rows that rest on drafts other than the first `accepted` of the last proposal."""
        take_back(self._sequence, self._rows, self._drafted, accepted)
        for module in range(self._drafted):
            kept = self._sequence.draft_length(module)
            self._pending[module].drop(kept)
            if module + 1 < self._modules:
                self._pending[module + 1].cut(kept)
        self._drafted = 0

    def _ready(self, module: int, tokens: SequenceOf[int]) -> int:
        """Rows that could run now: input there, token known. The newest stays: its logits make a draft."""
        given = self._sequence.draft_length(module - 1) if module else self._rows
        end = min(given, self._rows - 1, len(tokens) - 1 - module)
        return max(end - self._sequence.draft_length(module), 0)

    def _feed(self, module: int, tokens: SequenceOf[int], count: int) -> Calls[None]:
        """Run at most `count` rows that nobody wants logits of; at least one."""
        first = self._sequence.draft_length(module)
        ids = tokens[first + 1 + module : first + 1 + module + count]
        yield from self._run(module, ids, _NO_ROWS, divisible=True)
        self._pending[module].drop(self._sequence.draft_length(module))

    def _run(self, module: int, ids: SequenceOf[int], rows: Ids, *, divisible: bool = False) -> Calls[Step]:
        first = self._sequence.draft_length(module)
        hidden = self._pending[module].read(first, first + len(ids))
        call = Call(self._sequence, np.array(ids, dtype=np.int64), rows, hidden)
        step = yield from step_of(ModelCall(module, call, divisible))
        if module + 1 < self._modules:
            self._pending[module + 1].append(step.hidden)
        return step


def take_back(sequence: Sequence, rows: int, depth: int, accepted: int) -> None:
    """Truncate modules' rows that rest on refused drafts.

    Args:
        sequence: Of which modules 0 .. depth-1 have drafted.
        rows: The decoder's before the drafts were verified.
        depth: How many drafts there were.
        accepted: How many of them stand.
    """
    for module in range(depth):
        valid = max(rows + accepted - module, 0)
        if sequence.draft_length(module) > valid:
            sequence.truncate_draft(module, valid)
