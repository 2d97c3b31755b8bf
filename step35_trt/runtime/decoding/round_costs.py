"""What packed steps and rounds cost by their number of tokens: measured, assumed where nothing was yet."""

from __future__ import annotations

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
        self._curve: dict[float, float] | None = {}  # seconds by mean tokens; None where samples are newer
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
            self._curve = {mean: cost.seconds for mean, cost in samples or self._samples.values()}
        measured = self._curve
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

    def known(self, tokens: int) -> bool:
        """Whether rounds of about so many tokens were measured often enough."""
        ...

    def age(self, tokens: int) -> float:
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

    def known(self, tokens: int) -> bool:
        """See `Costs`."""
        return self._decoder.known(tokens)

    def age(self, tokens: int) -> float:
        """See `Costs`."""
        return self._decoder.age(tokens)


class RoundCosts:
    """`Costs` of rounds that are measured whole, by the tokens that the decoder runs in them.

    Args:
        prior: See `StepwiseCosts`.
    """

    def __init__(self, prior: Callable[[int], float]) -> None:
        self._whole = StepCosts(prior)

    def record(self, tokens: int, seconds: float) -> None:
        """A round of so many tokens took so long."""
        self._whole.record(tokens, seconds)

    def seconds(self, tokens: int, drafting: SequenceOf[int]) -> float:
        """See `Costs`; what was measured has the modules in it."""
        seconds = self._whole.seconds(tokens)
        if self._whole.known(tokens):
            return seconds
        return seconds + PRIOR_MODULE * self._whole.seconds(1) * sum(count > 0 for count in drafting)

    def known(self, tokens: int) -> bool:
        """See `Costs`."""
        return self._whole.known(tokens)

    def age(self, tokens: int) -> float:
        """See `Costs`."""
        return self._whole.age(tokens)
