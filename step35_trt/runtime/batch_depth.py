"""How many tokens each of many sequences drafts in the round they share.

A packed step costs what all its tokens cost together, and with a mixture of experts that is far from linear:
T tokens that choose top_k of E experts evenly load E (1 - (1 - top_k/E)^T) of them on average. At batch 1 a
draft pays for experts of its own; once the others' tokens have loaded nearly all, it costs little more than
its arithmetic; where arithmetic is what limits, it costs its full share. No rule for one sequence sees that,
so the depths of a round are chosen together.

With p_ij the probability that draft j of sequence i stands (the product of its heads' acceptances), the round
yields n + sum of p_ij tokens. p_ij falls with j, so the best set of m drafts is the m largest, and these are
prefixes. For each m the round's cost is read off what steps were measured to cost (`StepCosts`), and the m of
the most tokens per second wins; only the largest m of a size class is looked at, so that few sizes come up
and each is measured often. Depths hardly measured, or long ago, are tried now and then by all sequences
together, as `depth.py` does for one.
"""

from __future__ import annotations

from math import inf, log2, prod
from typing import TYPE_CHECKING

from step35_trt.checkpoint import expected_tensors
from step35_trt.runtime.depth import (
    NEW_EVERY,
    OLD_EVERY,
    PRIOR_ACCEPTANCE,
    WARM_SAMPLES,
    Acceptance,
    AverageCost,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as SequenceOf

    from step35_trt.config import Step35Config

# What a token's own arithmetic and activations add to a step, as a share of one token's step.
PRIOR_TOKEN = 0.02
PRIOR_MODULE = 0.05  # a module's step, as a share of the decoder's of one token: a layer beside many
SIZES_PER_OCTAVE = 4  # of numbers of tokens that count as one when costs are averaged
# Rows that a drafting sequence gives a module: the newest, and about one that became true in the last round.
MODULE_ROWS = 2
PRIOR_TESTS = 4  # that the others' acceptance counts for in a sequence's own


def prior_cost(config: Step35Config) -> Callable[[int], float]:
    """Cost of a decoder step of T tokens relative to one of 1, as the bytes of weights that it reads.

    The formula of `steps.Cost.bytes` over the whole decoder: dense weights once, of the routed experts the
    expected union of what the tokens choose.
    """
    elsewhere = ("model.embed_tokens.", *(f"{layer.prefix}." for layer in config.mtp_layers))
    dense = routed = 0
    for name, shape in expected_tensors(config).items():
        if name.startswith(elsewhere):
            continue
        if len(shape) == 3:  # only routed experts are stacked
            routed += prod(shape)
        else:
            dense += prod(shape)
    missed = 1 - config.moe_top_k / config.moe_num_experts

    def relative(tokens: int) -> float:
        return (dense + routed * (1 - missed**tokens)) / (
            dense + routed * (1 - missed)
        ) + PRIOR_TOKEN * tokens

    return relative


class StepCosts:
    """Seconds of one graph's steps by their number of tokens.

    Args:
        prior: Costs relative to each other where nothing was measured.
    """

    def __init__(self, prior: Callable[[int], float]) -> None:
        self._prior = prior
        self._samples: dict[int, tuple[float, AverageCost]] = {}  # by size class: mean tokens, seconds
        self._now = 0

    @property
    def measured(self) -> bool:
        """Whether `seconds` are seconds."""
        return bool(self._samples)

    def record(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        self._now += 1
        mean, cost = self._samples.get(_size_class(tokens), (float(tokens), AverageCost()))
        cost.update(seconds, self._now)
        self._samples[_size_class(tokens)] = mean + 0.125 * (tokens - mean), cost

    def seconds(self, tokens: int) -> float:
        """What a step of so many tokens is expected to take; relative where nothing was measured.

        Between two measured sizes the line through them, beyond them what the nearest says, scaled by the
        prior.
        """
        if not tokens:
            return 0.0
        samples = [pair for pair in self._samples.values() if pair[1].samples >= WARM_SAMPLES - 1]
        measured = {mean: cost.seconds for mean, cost in samples or self._samples.values()}
        below = max((mean for mean in measured if mean <= tokens), default=None)
        above = min((mean for mean in measured if mean > tokens), default=None)
        if below is not None and above is not None:
            share = (tokens - below) / (above - below)
            return measured[below] + share * (measured[above] - measured[below])
        nearest = above if below is None else below
        scale = 1.0 if nearest is None else measured[nearest] / self._prior(round(nearest))
        return scale * self._prior(tokens)

    def known(self, tokens: int) -> bool:
        """Whether steps of about this size were measured often enough."""
        sample = self._samples.get(_size_class(tokens))
        return sample is not None and sample[1].samples >= WARM_SAMPLES - 1

    def age(self, tokens: int) -> float:
        """Steps since one of about this size was measured."""
        sample = self._samples.get(_size_class(tokens))
        return inf if sample is None else self._now - sample[1].updated


def _size_class(tokens: int) -> int:
    """Sizes up to 8 each by itself, larger ones in classes of equal ratio."""
    return tokens if tokens <= 8 else 8 + round(SIZES_PER_OCTAVE * log2(tokens / 8))


class Member:
    """One sequence's `DepthPolicy`: the depth that was chosen for it, and its acceptances."""

    def __init__(self, batch: BatchDepth) -> None:
        self._batch = batch
        self.depth = 0
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
        prior: What a decoder step of T tokens costs relative to others (`prior_cost`).
    """

    def __init__(self, modules: int, prior: Callable[[int], float]) -> None:
        self._modules = modules
        self._all = Acceptance([PRIOR_ACCEPTANCE] * modules)
        self._round = 0
        self._decoder = StepCosts(prior)
        self._module_costs = [StepCosts(lambda rows: 1 + PRIOR_TOKEN * rows) for _ in range(modules)]

    @property
    def acceptance(self) -> tuple[float, ...]:
        """Estimated probability for each head, over all sequences."""
        return self._all.rates

    def member(self) -> Member:
        """A new sequence."""
        return Member(self)

    def costs(self, module: int | None) -> StepCosts:
        """What steps of a module, or of the decoder, were measured to cost."""
        return self._decoder if module is None else self._module_costs[module]

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
        for member in members:
            member.depth = trial or 0
        if trial is None:
            self._best(members, others)

    def _trial(self, count: int, others: int) -> int | None:
        """A depth for all that is tried because its cost is unknown or old; None for the best."""
        sizes = [others + count * (1 + depth) for depth in range(self._modules + 1)]
        unknown = [depth for depth, size in enumerate(sizes) if not self._decoder.known(size)]
        if unknown and self._round % NEW_EVERY == NEW_EVERY - 1:
            return unknown[-1]
        if self._round % OLD_EVERY == OLD_EVERY - 1:
            return max(range(len(sizes)), key=lambda depth: self._decoder.age(sizes[depth]))
        return None

    def _best(self, members: SequenceOf[Member], others: int) -> None:
        """The drafts most likely to stand, as many as give the most tokens per second."""
        chances = []
        for place, member in enumerate(members):
            chance = 1.0
            for head, rate in enumerate(member.acceptance.rates):
                chance *= rate
                chances.append((-chance, head, place))
        chances.sort()
        drafting = [0] * self._modules  # sequences that use each module
        tokens = float(len(members))
        most, taken = tokens / self._seconds(len(members) + others, drafting), 0
        for count, (chance, head, _) in enumerate(chances, start=1):
            tokens -= chance
            drafting[head] += 1
            size = len(members) + others + count
            if count < len(chances) and _size_class(size) == _size_class(size + 1):
                continue
            rate = tokens / self._seconds(size, drafting)
            if rate > most:
                most, taken = rate, count
        for _, head, place in chances[:taken]:
            members[place].depth = max(members[place].depth, head + 1)

    def _seconds(self, tokens: int, drafting: SequenceOf[int]) -> float:
        seconds = self._decoder.seconds(tokens)
        for costs, count in zip(self._module_costs, drafting, strict=True):
            if count:
                scale = 1.0 if costs.measured else PRIOR_MODULE * self._decoder.seconds(1)
                seconds += scale * costs.seconds(MODULE_ROWS * count)
        return seconds
