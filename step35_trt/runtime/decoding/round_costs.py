"""What packed steps and rounds cost by their number of tokens: measured, assumed where nothing was yet."""

from __future__ import annotations

from bisect import bisect_right
from math import inf, log2, prod
from typing import TYPE_CHECKING, Protocol

from step35_trt.checkpoint import expected_tensors
from step35_trt.runtime.decoding.depth import WARM_SAMPLES, AverageCost

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
        # Of each class its mean tokens, ascending, and seconds; None where samples are newer.
        self._curve: tuple[list[float], list[float]] | None = None
        self._now = 0

    @property
    def measured(self) -> bool:
        """Whether `seconds` are seconds."""
        return bool(self._samples)

    def record(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        self._now += 1
        self._curve = None
        mean, cost = self._samples.get(size_class(tokens), (float(tokens), AverageCost()))
        cost.update(seconds, self._now)
        self._samples[size_class(tokens)] = mean + 0.125 * (tokens - mean), cost

    def seconds(self, tokens: int) -> float:
        """What a step of so many tokens is expected to take; relative where nothing was measured.

        Between two measured sizes the line through them, beyond them what the nearest says, scaled by the
        prior.
        """
        if not tokens:
            return 0.0
        if self._curve is None:
            samples = [pair for pair in self._samples.values() if pair[1].samples >= WARM_SAMPLES - 1]
            pairs = sorted((mean, cost.seconds) for mean, cost in samples or self._samples.values())
            self._curve = [mean for mean, _ in pairs], [seconds for _, seconds in pairs]
        means, seconds = self._curve
        if not means:
            return self._prior(tokens)
        above = bisect_right(means, tokens)
        if 0 < above < len(means):
            share = (tokens - means[above - 1]) / (means[above] - means[above - 1])
            return seconds[above - 1] + share * (seconds[above] - seconds[above - 1])
        nearest = min(above, len(means) - 1)
        return seconds[nearest] / self._prior(round(means[nearest])) * self._prior(tokens)

    def known(self, tokens: int) -> bool:
        """Whether steps of about this size were measured often enough."""
        sample = self._samples.get(size_class(tokens))
        return sample is not None and sample[1].samples >= WARM_SAMPLES - 1

    def age(self, tokens: int) -> float:
        """Steps since one of about this size was measured."""
        sample = self._samples.get(size_class(tokens))
        return inf if sample is None else self._now - sample[1].updated


def size_class(tokens: int) -> int:
    """Which sizes count as one: those up to 8 each by itself, larger ones in classes of equal ratio."""
    return tokens if tokens <= 8 else 8 + round(SIZES_PER_OCTAVE * log2(tokens / 8))


class Costs(Protocol):
    """What a round costs."""

    def seconds(self, tokens: int, drafting: SequenceOf[int]) -> float:
        """What is expected of a round.

        Args:
            tokens: That the decoder runs.
            drafting: Sequences that use each module.
        """
        ...

    def known(self, tokens: int, modules: int) -> bool:
        """Whether rounds of about so many tokens and so many drafting modules were measured often enough."""
        ...

    def age(self, tokens: int, modules: int) -> float:
        """How long ago one was measured."""
        ...


class StepwiseCosts:
    """`Costs` of rounds whose steps are measured one by one.

    Args:
        modules: Number of heads.
        prior: What a decoder step of T tokens costs relative to others (`prior_cost`).
    """

    def __init__(self, modules: int, prior: Callable[[int], float]) -> None:
        self._decoder = StepCosts(prior)
        self._modules = [StepCosts(lambda rows: 1 + PRIOR_TOKEN * rows) for _ in range(modules)]

    def of(self, module: int | None) -> StepCosts:
        """What steps of a module, or of the decoder, were measured to cost."""
        return self._decoder if module is None else self._modules[module]

    def seconds(self, tokens: int, drafting: SequenceOf[int]) -> float:
        """See `Costs`."""
        seconds = self._decoder.seconds(tokens)
        for costs, count in zip(self._modules, drafting, strict=True):
            if count:
                scale = 1.0 if costs.measured else PRIOR_MODULE * self._decoder.seconds(1)
                seconds += scale * costs.seconds(MODULE_ROWS * count)
        return seconds

    def known(self, tokens: int, modules: int) -> bool:
        """See `Costs`; the decoder's steps decide."""
        return self._decoder.known(tokens)

    def age(self, tokens: int, modules: int) -> float:
        """See `Costs`."""
        return self._decoder.age(tokens)


class RoundCosts:
    """`Costs` of rounds that are measured whole.

    They are kept apart by how many modules draft: a module's step takes hardly less time for one sequence
    than for all, so tokens alone do not tell what a round costs.

    Args:
        modules: Number of heads.
        prior: See `StepwiseCosts`.
    """

    def __init__(self, modules: int, prior: Callable[[int], float]) -> None:
        self._whole = [StepCosts(prior) for _ in range(modules + 1)]

    def record(self, tokens: int, modules: int, seconds: float) -> None:
        """A round of so many tokens in which so many modules drafted took so long."""
        self._whole[modules].record(tokens, seconds)

    def seconds(self, tokens: int, drafting: SequenceOf[int]) -> float:
        """See `Costs`; of numbers of modules that were not measured, what the nearest says."""
        modules = sum(count > 0 for count in drafting)
        measured = [number for number, costs in enumerate(self._whole) if costs.measured]
        nearest = min(measured, key=lambda number: abs(number - modules), default=0)
        costs = self._whole[nearest]
        return costs.seconds(tokens) + (modules - nearest) * PRIOR_MODULE * costs.seconds(1)

    def known(self, tokens: int, modules: int) -> bool:
        """See `Costs`."""
        return self._whole[modules].known(tokens)

    def age(self, tokens: int, modules: int) -> float:
        """See `Costs`."""
        return self._whole[modules].age(tokens)
