"""How many tokens each of many sequences drafts in the round they share.

A packed step costs what all its tokens cost together, and with a mixture of experts that is far from linear:
T tokens that choose top_k of E experts evenly load E (1 - (1 - top_k/E)^T) of them on average. At batch 1 a
draft pays for experts of its own; once the others' tokens have loaded nearly all, it costs little more than
its arithmetic; where arithmetic is what limits, it costs its full share. No rule for one sequence sees that,
so the depths of a round are chosen together.

With p_ij the probability that draft j of sequence i stands (the product of its heads' acceptances), the round
yields n + sum of p_ij tokens. For each depth K the sequences are put in order of what K drafts of theirs are
worth, and of the first m of them, which draft K tokens while the others draft none, the round's cost is read
off what was measured (`round_costs.py`); the K and m of the most tokens per second win. Depths between 0 and
K would gain little: a module's step takes about as long for one sequence as for all, and rounds of few kinds
are prepared once and measured often. Therefore only the largest m of a size class is looked at, too, and what
was chosen before stays unless another choice is better by more than what is known of either is off. It is
looked at again after a few rounds, as that takes time. Depths hardly measured, or long ago, are tried now and
then by all sequences together, as `depth.py` does for one. Who shares no step shares no choice: rounds that a
session runs at once (`session.Rounds`) have a choice and costs of their own.
"""

from __future__ import annotations

from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING

from step35_trt.runtime.decoding.depth import NEW_EVERY, OLD_EVERY, PRIOR_ACCEPTANCE, Acceptance
from step35_trt.runtime.decoding.round_costs import size_class

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from step35_trt.runtime.decoding.round_costs import Costs

PRIOR_TESTS = 4  # that the others' acceptance counts for in a sequence's own
STANDS = 4  # rounds
BETTER = 1.08  # tokens per second that another choice has to promise, in those of the one that was made


class Member:
    """One sequence's `DepthPolicy`: its depth, and its acceptances."""

    def __init__(self, batch: BatchDepth) -> None:
        self._batch = batch
        self.depth = self.chosen = 0  # they differ where a depth is tried
        # A new sequence is expected to do as those before it did.
        self.acceptance = Acceptance(batch.acceptance, PRIOR_TESTS)

    def choose(self, limit: int) -> int:
        """See `DepthPolicy`."""
        return min(self.depth, limit)

    def record(self, depth: int, accepted: int, seconds: float) -> None:
        """See `DepthPolicy`; what a round takes is measured by steps, not by sequences."""
        self.acceptance.record(depth, accepted)
        self._batch.record(depth, accepted)


class BatchDepth:
    """Chooses the depths of a round; see the module's text for the maths.

    Args:
        modules: Number of heads, so the largest depth.
        costs: Of its rounds.
    """

    def __init__(self, modules: int, costs: Costs) -> None:
        self._modules = modules
        self._costs = costs
        self._all = Acceptance([PRIOR_ACCEPTANCE] * modules)
        self._round = 0
        self._looked: tuple[int, list[Member], int] | None = None  # in which round, for whom, beside what

    @property
    def acceptance(self) -> tuple[float, ...]:
        """Estimated probability for each head, over all sequences."""
        return self._all.rates

    def member(self) -> Member:
        """A new sequence."""
        return Member(self)

    def record(self, depth: int, accepted: int) -> None:
        """A sequence's round."""
        self._all.record(depth, accepted)

    def choose(self, members: SequenceOf[Member], others: int) -> None:
        """Set the depths of the next round.

        Args:
            members: The sequences that start a round.
            others: Tokens that the decoder will run beside theirs: prompts, rounds of fixed depth.
        """
        if not members or not self._modules:
            return
        self._round += 1
        trial = self._trial(len(members), others)
        if trial is None and not self._stands(members, others):
            self._best(members, others)
            self._looked = self._round, [*members], others
        for member in members:
            member.depth = member.chosen if trial is None else trial

    def _stands(self, members: SequenceOf[Member], others: int) -> bool:
        """Whether the latest look was at the same, and not long ago."""
        if self._looked is None:
            return False
        number, same, beside = self._looked
        return self._round < number + STANDS and beside == others and same == [*members]

    def _trial(self, count: int, others: int) -> int | None:
        """A depth for all that is tried because its cost is unknown or old; None for the best."""
        if self._round % NEW_EVERY != NEW_EVERY - 1:
            return None
        sizes = [others + count * (1 + depth) for depth in range(self._modules + 1)]
        unknown = [depth for depth, size in enumerate(sizes) if not self._costs.known(size, depth)]
        if unknown:
            return unknown[-1]
        if self._round % OLD_EVERY == OLD_EVERY - 1:
            return max(range(len(sizes)), key=lambda depth: self._costs.age(sizes[depth], depth))
        return None

    def _best(self, members: SequenceOf[Member], others: int) -> None:
        """The sequences whose drafts are most likely to stand, as many as give the most tokens per second."""
        plain = len(members)
        worth = [[0.0, *accumulate(accumulate(member.acceptance.rates, mul))] for member in members]
        drafting = [sum(member.chosen > module for member in members) for module in range(self._modules)]
        tokens = plain + sum(own[member.chosen] for own, member in zip(worth, members, strict=True))
        most = BETTER * tokens / self._costs.seconds(plain + others + sum(drafting), drafting)
        best: tuple[int, list[int]] | None = None
        for depth in range(self._modules + 1):
            order = sorted(range(plain), key=lambda place: worth[place][depth], reverse=True)
            tokens = float(plain)
            for count, place in enumerate(order, start=1):
                tokens += worth[place][depth]
                size = plain + others + count * depth
                if count < plain and size_class(size) == size_class(size + depth):
                    continue
                drafting = [count] * depth + [0] * (self._modules - depth)
                rate = tokens / self._costs.seconds(size, drafting)
                if rate > most:
                    most, best = rate, (depth, order[:count])
        if best is not None:
            for place, member in enumerate(members):
                member.chosen = best[0] if place in best[1] else 0
