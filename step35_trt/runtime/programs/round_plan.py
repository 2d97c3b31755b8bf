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
from functools import lru_cache
from typing import TYPE_CHECKING

from step35_trt.runtime.programs.orders import DECODER

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from step35_trt.runtime.session import RoundCall


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
    token_ids: tuple[int, ...]
    rows: tuple[int, ...]

    @property
    def end(self) -> int:
        """Rows that the graph has afterwards."""
        return self.past + len(self.token_ids)

    @property
    def place(self) -> int:
        """In the order of a round: modules without logits, modules that draft, the decoder."""
        if self.graph == DECODER:
            return 0
        return self.graph if len(self.rows) else -self.graph

    def filled(self, drafts: SequenceOf[int]) -> tuple[int, ...]:
        """The ids with the round's drafts in their places."""
        return tuple(drafts[-1 - token] if token < 0 else token for token in self.token_ids)


@dataclass(frozen=True)
class PartShape:
    """A part as far as it does not depend on which tokens there are; everything is counted from n.

    Attributes:
        graph: See `Part`.
        behind: Rows that the graph is behind the decoder before.
        tokens: `[t]`; t_n is 0, earlier ones are below, and 1 + j is draft j of the round.
        rows: See `Part`.
    """

    graph: int
    behind: int
    tokens: tuple[int, ...]
    rows: tuple[int, ...]

    def part(self, n: int, token_ids: SequenceOf[int]) -> Part:
        """With the tokens, of which the last is t_n."""
        ids = tuple(-token if token > 0 else token_ids[token - 1] for token in self.tokens)
        return Part(self.graph, n - self.behind, ids, self.rows)


def lags_of(call: RoundCall) -> tuple[int, ...]:
    """Rows that each module is behind the decoder."""
    n, behind = call.sequence.length, call.sequence.draft_length
    return tuple(n - behind(module) for module in range(call.modules))


def parts(call: RoundCall, queries: int) -> list[Part]:
    """A round's parts of one sequence, in the order in which they run."""
    found = shapes(lags_of(call), call.depth, queries)
    assert all(len(call.token_ids) > -token for shape in found for token in shape.tokens)
    return [shape.part(call.sequence.length, call.token_ids) for shape in found]


@lru_cache(maxsize=1024)
def shapes(lags: tuple[int, ...], depth: int, queries: int) -> tuple[PartShape, ...]:
    """What a round of a sequence is made of.

    Args:
        lags: Rows that each module is behind the decoder.
        depth: Drafts.
        queries: Q, see the module's text.
    """
    assert max(lags, default=0) <= 2 * queries, "a module is too far behind"
    assert 0 <= depth <= len(lags) < queries
    behind, found = list(lags), list[PartShape]()
    given = 0
    for module, lag in enumerate(lags):
        if lag > queries:
            behind[module] = max(lag - queries, given, module, 1)
            first = 1 + module - lag
            tokens = range(first, first + lag - behind[module])
            found.append(PartShape(1 + module, lag, tuple(tokens), ()))
        given = behind[module]
    for module, lag in enumerate(behind[:depth]):
        assert 0 < lag <= queries
        tokens = range(1 + module - lag, 1 + module)
        found.append(PartShape(1 + module, lag, tuple(tokens), (lag - 1,)))
    verified = range(depth + 1)
    return (*found, PartShape(DECODER, 0, tuple(verified), tuple(verified)))
