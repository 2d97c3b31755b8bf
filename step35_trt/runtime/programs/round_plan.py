"""What a round runs for one sequence: which rows of which graphs, on which ids.

With n decoder rows and known tokens t_0 .. t_n, row p of module k takes token t_{p+1+k} and row p of what the
module before (the decoder) put out; specification 3.2. A module that drafts runs all rows it has not seen, to
n-1; the decoder then takes t_n and the drafts. Everything but the drafts is known beforehand.

Of one sequence a graph takes at most Q = `queries` rows at a time. A module that is further behind (nobody
drafted with it, or the prompt left a short backlog) first runs Q of its rows without logits. A round of `a`
accepted drafts leaves module k max(a, k) + 1 rows behind where it drafted, else a + 1 rows further than it
was, and a <= Q - 2 then; so once no module is more than 2Q rows behind, none is ever again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from step35_trt.runtime.programs.orders import DECODER

if TYPE_CHECKING:
    from step35_trt.runtime.session import Ids, RoundCall

_NONE = np.empty(0, np.int64)


@dataclass(frozen=True)
class Part:
    """One sequence's part of a step of a round.

    Attributes:
        graph: `DECODER`, or k + 1 for MTP module k.
        past: Rows that the graph has before.
        token_ids: `[t]`; -1 - j stands for draft j of the round.
        rows: `[r]` of them whose likeliest next token is wanted.
    """

    graph: int
    past: int
    token_ids: Ids
    rows: Ids

    @property
    def place(self) -> int:
        """In the order of a round: modules without logits, modules that draft, the decoder."""
        if self.graph == DECODER:
            return 0
        return self.graph if len(self.rows) else -self.graph

    def filled(self, drafts: Ids) -> Ids:
        """The ids with the round's drafts in their places."""
        taken = self.token_ids < 0
        ids = self.token_ids.copy()
        ids[taken] = drafts[-1 - self.token_ids[taken]]
        return ids


def parts(call: RoundCall, queries: int) -> list[Part]:
    """A round's parts of one sequence, in the order in which they run."""
    sequence, n = call.sequence, call.sequence.length
    rows = [sequence.draft_length(module) for module in range(call.modules)]
    assert all(n - length <= 2 * queries for length in rows), "a module is too far behind"
    assert 0 <= call.depth <= call.modules < queries

    def tokens(first: int, end: int) -> Ids:
        """t_first .. t_{end-1}, drafts where they are not known."""
        assert n + 1 - first <= len(call.token_ids)
        known = call.token_ids[first - (n + 1) :] if first <= n else _NONE
        drafts = np.arange(max(first, n + 1), max(end, n + 1))
        return np.concatenate([known[: end - first], n - drafts])

    found = []
    given = n
    for module in range(call.modules):
        if n - rows[module] > queries:
            end = min(rows[module] + queries, given, n - max(module, 1))
            ids = tokens(rows[module] + 1 + module, end + 1 + module)
            found.append(Part(1 + module, rows[module], ids, _NONE))
            rows[module] = end
        given = rows[module]
    for module in range(call.depth):
        count = n - rows[module]
        assert 0 < count <= queries
        ids = tokens(rows[module] + 1 + module, n + 1 + module)
        found.append(Part(1 + module, rows[module], ids, np.array([count - 1])))
    verified = call.depth + 1
    found.append(Part(DECODER, n, tokens(n, n + verified), np.arange(verified)))
    return found
