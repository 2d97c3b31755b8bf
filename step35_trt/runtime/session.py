"""What can run a bundle: one protocol, one file per back end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from step35_trt.config import Step35Config

    Ids = NDArray[np.int64]
    Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Step:
    """The result of running T tokens.

    Attributes:
        logits: `[R, V]` fp32, one row for each requested row.
        hidden: `[T, D]` fp32, the block output before the final (or the module's own) norm.
    """

    logits: Floats
    hidden: Floats


class Sequence(Protocol):
    """The caches of one sequence: the decoder's and each MTP module's, all counted in rows (positions).

    A row is appended at position `length`; `truncate` may take back rows of the latest call only, which is
    what rejected drafts need, and must leave exactly the state in which they never were.
    """

    @property
    def length(self) -> int:
        """Rows the decoder has cached."""
        ...

    def decode(self, token_ids: Ids, rows: Ids) -> Step:
        """Append `token_ids` `[T]` to the decoder; `rows` `[R]` index those whose logits are wanted.

        Raises:
            DoesNotFitError: the context limit would be passed.
        """
        ...

    def truncate(self, length: int) -> None:
        """Forget decoder rows at and after `length`."""
        ...

    def draft_length(self, module: int) -> int:
        """Rows MTP module `module` has cached."""
        ...

    def draft(self, module: int, token_ids: Ids, hidden: Floats, rows: Ids) -> Step:
        """Append rows to an MTP module: row p takes token p+1+module and `hidden` of row p (spec 3.2)."""
        ...

    def truncate_draft(self, module: int, length: int) -> None:
        """Forget rows of a module at and after `length`."""
        ...


class Session(Protocol):
    """A loaded bundle."""

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
        """Tokens a single call should take at most."""
        ...

    def open(self) -> Sequence:
        """Start an empty sequence."""
        ...
