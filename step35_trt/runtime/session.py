"""What can run a bundle: one protocol, one file per back end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    import numpy as np
    from numpy.typing import NDArray

    from step35_trt.config import Step35Config

    Ids = NDArray[np.int64]
    Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Step:
    """The result of running T tokens of one sequence.

    Attributes:
        logits: `[R, V]` fp32, one row for each requested row.
        hidden: `[T, D]` fp32, the block output before the final (or the module's own) norm.
    """

    logits: Floats
    hidden: Floats


@dataclass(frozen=True)
class Call:
    """Tokens to append to one sequence: its part of a packed step.

    Attributes:
        sequence: Of the session that runs the step, and open.
        token_ids: `[T]`, at least one; for MTP module k, row p takes token p+1+k (specification 3.2).
        rows: `[R]` of them whose logits are wanted, ascending.
        hidden: `[T, D]` for an MTP module: what the decoder (module 0) or the module before put out for the
            same rows; None for the decoder.
    """

    sequence: Sequence
    token_ids: Ids
    rows: Ids
    hidden: Floats | None = None


@dataclass(frozen=True)
class RoundCall:
    """One sequence's part of a round: greedy drafts, one of each MTP module, and their verification.

    Attributes:
        sequence: Of the session that runs the round, and open.
        token_ids: `[T]`, the last known tokens. The newest has no decoder row yet; the first is the one that
            the first row which a module has still to run takes, or an earlier one.
        depth: Drafts, 0 .. `modules`.
        modules: How many modules are to be kept fed, the first ones.
    """

    sequence: Sequence
    token_ids: SequenceOf[int]
    depth: int
    modules: int


@dataclass(frozen=True)
class RoundResult:
    """What a round's sequence came to.

    Attributes:
        drafts: `[depth]`, the likeliest token of each module's last row, the lowest id among equals; -1 where
            a logit is not finite.
        choices: `[depth + 1]`, what the decoder says after the newest token and after each draft; likewise.
    """

    drafts: SequenceOf[int]
    choices: SequenceOf[int]


@dataclass(frozen=True)
class Capacity:
    """What a session has room for beside what its open sequences hold.

    Within it nothing fails: a scheduler that admits a sequence only when its whole length fits here, beside
    what it promised to those that run, never sees a `DoesNotFitError`.

    Attributes:
        sequences: How many more may be opened.
        rows: Rows that new and open sequences may still take together. Cached prefixes that no open sequence
            holds count as free.
        page_rows: Rows are given out in pages of so many.
    """

    sequences: int
    rows: int
    page_rows: int

    def rows_for(self, length: int) -> int:
        """Rows that a sequence of `length` rows takes: whole pages."""
        return -(-length // self.page_rows) * self.page_rows


class Sequence(Protocol):
    """The caches of one sequence: the decoder's and each MTP module's, all counted in rows (positions).

    A row is appended at position `length`; `truncate` may take back rows of the latest call only, which is
    what rejected drafts need, and must leave exactly the state in which they never were. Of a call of many
    tokens no more than `MOST_REJECTED` rows can be taken back.
    """

    @property
    def length(self) -> int:
        """Rows the decoder has cached."""
        ...

    def decode(self, token_ids: Ids, rows: Ids) -> Step:
        """`Session.decode` with this sequence alone."""
        ...

    def truncate(self, length: int) -> None:
        """Forget decoder rows at and after `length`."""
        ...

    def draft_length(self, module: int) -> int:
        """Rows MTP module `module` has cached."""
        ...

    def draft(self, module: int, token_ids: Ids, hidden: Floats, rows: Ids) -> Step:
        """`Session.draft` with this sequence alone."""
        ...

    def truncate_draft(self, module: int, length: int) -> None:
        """Forget rows of a module at and after `length`."""
        ...

    def close(self) -> None:
        """Give back what it holds. It cannot be used after that; closing again does nothing.

        A sequence that nobody refers to any more closes itself.
        """
        ...


class Session(Protocol):
    """A loaded bundle. One thread uses it at a time."""

    @property
    def config(self) -> Step35Config:
        """The model's configuration."""
        ...

    @property
    def max_tokens(self) -> int:
        """Rows a sequence can hold: prompt and answer together."""
        ...

    @property
    def prefill_chunk(self) -> int:
        """Tokens that a single step should take at most, all its calls together."""
        ...

    @property
    def capacity(self) -> Capacity:
        """What there is room for now."""
        ...

    def open(self, prompt_ids: Ids | None = None, modules: int | None = None) -> Sequence:
        """Start a sequence: empty, or with what earlier sequences left of the same prompt.

        With `prompt_ids` `[T]` the sequence starts with the longest prefix of them whose rows are still
        cached: `length` and the `draft_length` of each module that will run are that prefix's length, a
        multiple of the page (0 where nothing is cached). At least one token of the prompt is left to run,
        and as many as the last of these modules looks ahead; the caller decodes from `length` on.

        Args:
            prompt_ids: What the sequence will begin with.
            modules: How many MTP modules will run on it, the first ones; absent: all. The others may not.

        Raises:
            DoesNotFitError: as many sequences are open as the session may hold.
        """
        ...

    def decode(self, calls: SequenceOf[Call]) -> list[Step]:
        """One packed decoder step: append each call's tokens to its sequence. A sequence comes at most once.

        Returns:
            The result of each call, in order.

        Raises:
            DoesNotFitError: a sequence would pass the context limit, or there are not enough pages for all
                of them; no sequence has changed.
        """
        ...

    def draft(self, module: int, calls: SequenceOf[Call]) -> list[Step]:
        """One packed step of MTP module `module`, as `decode`; every call has `hidden`."""
        ...


class Rounds(Protocol):
    """A session's way to run whole rounds, if it has one: logits and hidden rows stay where they are made.

    After a round the caller truncates what rests on refused drafts, as after steps. Hidden rows of a
    sequence's last rows are kept by the session, so rounds may follow any steps after which no module is more
    than `behind` rows behind the decoder; steps of modules after rounds need rows that nobody has outside.
    """

    @property
    def drafts(self) -> int:
        """Drafts of one sequence at most."""
        ...

    @property
    def behind(self) -> int:
        """Rows that a module may be behind the decoder when a round begins."""
        ...

    def round(self, calls: SequenceOf[RoundCall]) -> list[RoundResult]:
        """One packed round; depths may differ. A sequence comes at most once.

        Every module that drafts has then run up to the decoder's last row before the round, the others as
        far as keeps them within `behind`; the decoder has the newest token and all drafts.

        Returns:
            The result of each call, in order.

        Raises:
            DoesNotFitError: as `Session.decode`; no sequence has changed.
        """
        ...


@runtime_checkable
class OffersRounds(Protocol):
    """A session that may have `Rounds`."""

    @property
    def rounds(self) -> Rounds | None:
        """None where it runs steps only."""
        ...


def rounds_of(session: Session) -> Rounds | None:
    """A session's `Rounds`, if it has them."""
    return session.rounds if isinstance(session, OffersRounds) else None


# Rows that a caller may take back from the latest call: three drafts, and a few to spare.
MOST_REJECTED = 8
