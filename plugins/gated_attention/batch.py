"""Which packed tokens belong to which sequence, and where their keys and values lie."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from .geometry import Geometry


@dataclass(frozen=True)
class PagedCache:
    """Keys and values of one layer, normed and turned, in pages that sequences share out among themselves.

    Position p of sequence s is row `p % page` of page `table[s, (p // page) % table_pages]`: a table that is
    wide enough holds all of a sequence, a narrower one is a ring. A number x is stored as `x / scale[g]`;
    bf16 pages have scales of 1.

    Attributes:
        keys: `[pages, G, page, d]` fp32, bf16 or e4m3.
        values: Like `keys`.
        table: `[sequences, table_pages]` int32; entries of rows never reached may be any valid page.
        key_scale: `[G]` fp32.
        value_scale: `[G]` fp32.
    """

    keys: Tensor
    values: Tensor
    table: Tensor
    key_scale: Tensor
    value_scale: Tensor


@dataclass(frozen=True)
class Batch:
    """`lengths[s]` new tokens of each sequence, packed in order; `pasts[s]` rows it has already.

    The tensors say the same to kernels: `starts [sequences + 1]`, `offsets [sequences]` (the pasts) and
    `token_sequence [tokens]`, all int32.
    """

    lengths: tuple[int, ...]
    pasts: tuple[int, ...]
    starts: Tensor
    offsets: Tensor
    token_sequence: Tensor
    _blocks: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, lengths: Sequence[int], pasts: Sequence[int], device: torch.device | str = "cpu") -> Batch:
        """Describe a batch on `device`."""
        if len(lengths) != len(pasts) or any(n < 0 for n in (*lengths, *pasts)):
            raise ValueError(f"lengths {lengths} and pasts {pasts} do not describe a batch")

        def tensor(numbers: Sequence[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.int32, device=device)

        owners = [s for s, length in enumerate(lengths) for _ in range(length)]
        return cls(
            tuple(lengths),
            tuple(pasts),
            tensor([0, *itertools.accumulate(lengths)]),
            tensor(pasts),
            tensor(owners),
        )

    @property
    def tokens(self) -> int:
        """Packed tokens."""
        return sum(self.lengths)

    def decoded(self, queries: int) -> tuple[int, int]:
        """The most new tokens and the most rows of sequences with 1 to `queries` new tokens; else 0."""
        pairs = [(n, past + n) for n, past in zip(self.lengths, self.pasts, strict=True) if 0 < n <= queries]
        return max((n for n, _ in pairs), default=0), max((rows for _, rows in pairs), default=0)

    def prefill_blocks(self, queries: int, tokens: int) -> Tensor:
        """`[blocks, 2]` int32: sequence and first token of each piece of `tokens` of the longer sequences.

        What sees most keys comes first: then no long block is left running alone at the end.
        """
        key = (queries, tokens)
        if key not in self._blocks:
            found = [
                (s, first)
                for s, length in enumerate(self.lengths)
                if length > queries
                for first in range(0, length, tokens)
            ]
            found.sort(key=lambda block: -(self.pasts[block[0]] + block[1]))
            numbers = torch.tensor(found, dtype=torch.int32).reshape(-1, 2)
            self._blocks[key] = numbers.to(self.starts.device)
        return self._blocks[key]

    def check(self, cache: PagedCache, geometry: Geometry) -> None:
        """Refuse a table that the batch would overrun.

        Raises:
            ValueError: a write would reach a row that a query of this or a later call still sees.
        """
        rows = cache.table.shape[1] * geometry.page
        for length, past in zip(self.lengths, self.pasts, strict=True):
            total = past + length
            needed = min(total, geometry.window + length - 1) if geometry.window and length else total
            if length and needed > rows:
                raise ValueError(f"{length} tokens after {past} need {needed} rows, the table spans {rows}")
