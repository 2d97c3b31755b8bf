"""Calls of several sequences as one step's packed tokens, and its results as theirs again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from step35_trt.errors import DoesNotFitError
from step35_trt.runtime.session import Capacity, Step

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from step35_trt.runtime.session import Call, Floats, Ids, Sequence

# Of a session whose caches grow as long as there is memory.
UNBOUNDED = Capacity(sequences=1 << 30, rows=1 << 40, page_rows=1)


@dataclass(frozen=True)
class Packed:
    """A step's inputs.

    Attributes:
        lengths: Tokens of each call.
        counts: Wanted rows of each call.
        token_ids: `[t]`.
        rows: `[r]` places among the packed tokens.
        hidden: `[t, D]`, or None for the decoder.
    """

    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    token_ids: Ids
    rows: Ids
    hidden: Floats | None

    @classmethod
    def of(cls, calls: SequenceOf[Call]) -> Packed:
        """Put the calls' tokens one after the other."""
        if len(calls) == 1:  # as they are: a step of one token is short enough for this to matter
            (call,) = calls
            return cls((len(call.token_ids),), (len(call.rows),), call.token_ids, call.rows, call.hidden)
        lengths = tuple(len(call.token_ids) for call in calls)
        starts = np.cumsum((0, *lengths[:-1]))
        hidden = [call.hidden for call in calls if call.hidden is not None]
        return cls(
            lengths,
            tuple(len(call.rows) for call in calls),
            np.concatenate([call.token_ids for call in calls]),
            np.concatenate([call.rows + start for call, start in zip(calls, starts, strict=True)]),
            np.concatenate(hidden) if hidden else None,
        )

    def split(self, logits: Floats, hidden: Floats) -> list[Step]:
        """Each call's part of `[r, V]` and `[t, D]`."""
        if len(self.counts) == 1:
            return [Step(logits, hidden)]
        logit_parts = np.split(logits, np.cumsum(self.counts[:-1]))
        hidden_parts = np.split(hidden, np.cumsum(self.lengths[:-1]))
        return [Step(*parts) for parts in zip(logit_parts, hidden_parts, strict=True)]


def check_context(calls: SequenceOf[Call], lengths: SequenceOf[int], max_tokens: int) -> None:
    """See that no sequence, of the rows that `lengths` says, would pass the context.

    Raises:
        DoesNotFitError: one would.
    """
    after = [length + len(call.token_ids) for call, length in zip(calls, lengths, strict=True)]
    check_lengths([call.sequence for call in calls], after, max_tokens)


def check_lengths(sequences: SequenceOf[Sequence], after: SequenceOf[int], max_tokens: int) -> None:
    """See that no sequence passes the context with the rows that it is to have.

    Raises:
        DoesNotFitError: one would.
    """
    assert len(set(map(id, sequences))) == len(sequences), "a sequence comes at most once"
    if max(after, default=0) > max_tokens:
        raise DoesNotFitError(f"the context limit of {max_tokens} tokens would be passed")
