"""How many tokens to draft: from what drafts turn out to be worth and what a round is measured to cost.

With a_k the probability that head k's draft is right when those before it were, a round that drafts K
tokens yields 1 + a_1 + a_1 a_2 + ... + a_1 ... a_K tokens on average (the 1 is the decoder's own) and takes
c_K seconds. The best K maximises the quotient. Both are estimated while running:

* a_k = (hits + w prior) / (tests + w) with w = 1, where hits and tests fade by a constant factor every round,
  tested or not. Old evidence thus weighs little, and a head that was given up drifts back to a hopeful prior
  until it is worth a new test: stale acceptance needs no schedule of its own.
* c_K is an exponential average. The first samples only lower it (a first call compiles, allocates, warms up)
  and later ones are cut at twice the average, so one hiccup cannot change the choice for long. A depth
  without a sample is assumed to cost what the roofline says relative to those that have one. Every few
  rounds a depth without enough samples is tried, later and more rarely the one whose samples are oldest.

The choice depends on the past only, never on the drafts it decides about, so it changes no distribution.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from step35_trt.errors import UsageError
from step35_trt.runtime.decoding.sampling import whole

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

PRIOR_ACCEPTANCE = 0.75
# What each drafted token adds to a round, in plain steps: a memory-bound decoder at batch 1.
PRIOR_STEP = 0.38
FADE = 0.98  # of evidence, per round
WARM_SAMPLES = 3  # of a cost, until its average takes over from its minimum
# Rounds between trials of depths hardly measured, and of depths measured long ago.
NEW_EVERY, OLD_EVERY = 4, 64


@runtime_checkable
class DepthPolicy(Protocol):
    """Decides how many tokens each round drafts."""

    def choose(self, limit: int) -> int:
        """The next round's depth, 0 .. `limit`."""
        ...

    def record(self, depth: int, accepted: int, seconds: float) -> None:
        """Learn that a round of `depth` drafts took `seconds` and that the first `accepted` of them stood."""
        ...


class FixedDepth:
    """Always the same depth, as far as the limit allows."""

    def __init__(self, depth: int) -> None:
        self._depth = depth

    def choose(self, limit: int) -> int:
        """See `DepthPolicy`."""
        return min(self._depth, limit)

    def record(self, depth: int, accepted: int, seconds: float) -> None:
        """See `DepthPolicy`; nothing to learn."""


class Acceptance:
    """How likely each head's draft is right, given that those before it were.

    Args:
        prior: The estimate without evidence, one for each head.
        weight: How many tests the prior counts for.
    """

    def __init__(self, prior: SequenceOf[float], weight: float = 1.0) -> None:
        self._prior = tuple(prior)
        self._weight = weight
        self._hits = [0.0] * len(self._prior)
        self._tests = [0.0] * len(self._prior)

    @property
    def rates(self) -> tuple[float, ...]:
        """Estimated probability for each head."""
        return tuple(
            (hits + self._weight * prior) / (tests + self._weight)
            for hits, tests, prior in zip(self._hits, self._tests, self._prior, strict=True)
        )

    def record(self, depth: int, accepted: int) -> None:
        """Take in a round: only heads whose predecessors were right were tested."""
        self._hits = [FADE * hits for hits in self._hits]
        self._tests = [FADE * tests for tests in self._tests]
        for head in range(min(depth, accepted + 1)):
            self._tests[head] += 1
            self._hits[head] += head < accepted


class DepthController:
    """Chooses the depth that yields the most tokens per second; see the module's text for the maths.

    Args:
        modules: Number of heads, so the largest depth.
        timed: Whether to learn costs. Without, the prior costs stay and the choices follow from acceptance
            alone: a seeded answer must not depend on the clock.
    """

    def __init__(self, modules: int, *, timed: bool = True) -> None:
        self._timed = timed
        self._round = 0
        self._acceptance = Acceptance([PRIOR_ACCEPTANCE] * modules)
        self._costs = [AverageCost() for _ in range(modules + 1)]

    @property
    def acceptance(self) -> tuple[float, ...]:
        """Estimated probability for each head, given that the heads before it were right."""
        return self._acceptance.rates

    @property
    def costs(self) -> tuple[float, ...]:
        """Seconds of a round at depth 0, 1, ...; in plain steps as long as nothing was measured."""
        prior = [1 + PRIOR_STEP * depth for depth in range(len(self._costs))]
        ratios = [c.seconds / p for c, p in zip(self._costs, prior, strict=True) if c.samples]
        scale = min(ratios, default=1.0)  # the least disturbed by a warm-up
        return tuple(c.seconds if c.samples else p * scale for c, p in zip(self._costs, prior, strict=True))

    def best(self, limit: int) -> int:
        """The depth of the most tokens per second, the smallest among equals."""
        chosen, most = 0, 0.0
        tokens, all_right = 1.0, 1.0
        acceptance = self.acceptance
        for depth, cost in enumerate(self.costs[: limit + 1]):
            if depth:
                all_right *= acceptance[depth - 1]
                tokens += all_right
            if tokens / cost > most:
                chosen, most = depth, tokens / cost
        return chosen

    def choose(self, limit: int) -> int:
        """The best depth, or now and then one whose cost is unknown or old."""
        costs = self._costs[: limit + 1]
        if self._timed:
            unknown = [depth for depth, cost in enumerate(costs) if cost.samples < WARM_SAMPLES - 1]
            if unknown and self._round % NEW_EVERY == NEW_EVERY - 1:
                return unknown[-1]
            if self._round % OLD_EVERY == OLD_EVERY - 1:
                return min(range(len(costs)), key=lambda depth: costs[depth].updated)
        return self.best(min(limit, len(self._costs) - 1))

    def record(self, depth: int, accepted: int, seconds: float) -> None:
        """Take in a round."""
        self._round += 1
        self._acceptance.record(depth, accepted)
        if self._timed:
            self._costs[depth].update(seconds, self._round)


class AverageCost:
    """Seconds that something takes again and again, an average; see the module's text."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.samples = 0
        self.updated = 0  # round of the latest sample

    def update(self, seconds: float, now: int) -> None:
        """Take in a sample of round `now`."""
        seconds = max(seconds, 1e-9)  # a coarse clock may stand still
        if self.samples < WARM_SAMPLES:
            self.seconds = min(self.seconds, seconds) if self.samples else seconds
        else:
            self.seconds += 0.125 * (min(seconds, 2 * self.seconds) - self.seconds)
        self.samples += 1
        self.updated = now


DraftTokens = int | Literal["auto"] | DepthPolicy


def fixed_depth(draft_tokens: DraftTokens, heads: int) -> int | None:
    """The depth where it is fixed, None where it adapts.

    Raises:
        UsageError: it is neither 'auto', a policy, nor a whole number from 0 to `heads`.
    """
    if draft_tokens == "auto" or isinstance(draft_tokens, DepthPolicy):
        return None
    if not (whole(draft_tokens) and 0 <= draft_tokens <= heads):
        raise UsageError(
            f"draft_tokens must be 'auto' or a whole number from 0 to {heads}, the model's number of "
            f"MTP modules, not {draft_tokens!r}"
        )
    return draft_tokens


def depth_policy(draft_tokens: DraftTokens, limit: int, *, repeatable: bool) -> DepthPolicy:
    """What to draft by.

    Args:
        draft_tokens: See `fixed_depth`.
        limit: The largest depth that can run.
        repeatable: Whether choices may depend on nothing but the tokens.
    """
    if isinstance(draft_tokens, int):
        return FixedDepth(limit)
    if repeatable:
        return DepthController(limit, timed=False)
    return DepthController(limit) if draft_tokens == "auto" else draft_tokens
