"""The last hidden rows of every sequence, kept where they are made: what MTP modules take over in a round.

Of each graph whose rows a module takes, a slot has a ring; row p lies in place p % span. Every step writes
its last rows, so rounds may follow any steps. In a round after n decoder rows no row is read before n - 2Q,
where Q = `queries` (`round_plan`), and the newest one written before it, by a refused draft of the round
before, is n + Q - 3 at most: 3Q - 2 places suffice, and there are 4Q.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Which packed tokens are whose, on the device, int64.

    Attributes:
        starts: `[sequences + 1]`, where each sequence's tokens begin.
        pasts: `[sequences]`, rows that each has before.
        slots: `[sequences]`.
        owners: `[t]`, each token's sequence.
    """

    starts: Tensor
    pasts: Tensor
    slots: Tensor
    owners: Tensor

    @property
    def token_slots(self) -> Tensor:
        """`[t]`."""
        return self.slots[self.owners]

    @property
    def offsets(self) -> Tensor:
        """`[t]`, each token's place among its sequence's."""
        return torch.arange(len(self.owners), device=self.owners.device) - self.starts[self.owners]

    @property
    def positions(self) -> Tensor:
        """`[t]`, the row that each token becomes."""
        return self.pasts[self.owners] + self.offsets

    @property
    def left(self) -> Tensor:
        """`[t]`, tokens from each to its sequence's last."""
        return self.starts[self.owners + 1] - self.starts[self.owners] - self.offsets


@dataclass(frozen=True)
class HeldRows:
    """See the module's text.

    Attributes:
        rows: `[graphs, slots, span + 1, D]`: the decoder's and each module's but the last one's, in what they
            are computed in. The last place takes what need not be kept.
    """

    rows: Tensor

    @classmethod
    def of(
        cls, graphs: int, slots: int, queries: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> HeldRows:
        """Room for each slot's; `queries` are the most tokens of a sequence in a decoding step."""
        return cls(torch.zeros(graphs, slots, 4 * queries + 1, width, dtype=dtype, device=device))

    def keep(self, graph: int, packing: Packing, hidden: Tensor) -> None:
        """Take the rows `[t, D]` that a step of a graph has made."""
        if graph >= len(self.rows):
            return
        # Of a long call earlier rows would lie in the same places, and which one stays is left open.
        place = (packing.positions % self._span).masked_fill(packing.left > self._span, self._span)
        self.rows[graph].index_put_((packing.token_slots, place), hidden)

    def take(self, graph: int, packing: Packing) -> Tensor:
        """A graph's rows `[t, D]` of the positions that tokens of the next one become."""
        return self.rows[graph][packing.token_slots, packing.positions % self._span]

    @property
    def _span(self) -> int:
        return self.rows.shape[2] - 1
