"""From logits to tokens: filters, draws, and the verification of drafts that changes no distribution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Protocol

import numpy as np

from step35_trt.errors import UsageError, VerificationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from step35_trt.runtime.session import Floats, Ids

    Weights = NDArray[np.float64]

_BIN_SHIFT, _BINS = 50, 256  # four bins an octave; the last takes all below 2**-63
_BIN_OF_ONE = 1023 << (52 - _BIN_SHIFT)


class Rows(Protocol):
    """Rows of probabilities `[V]` fp64 by number: an array, a list, or something that makes them."""

    def __getitem__(self, row: int, /) -> Weights:
        """One row."""
        ...


@dataclass(frozen=True)
class SamplingParams:
    """How a token is drawn.

    The filters apply in the order temperature, top-k, top-p, min-p, each to what the one before left.

    Attributes:
        temperature: Divides the logits; 0 takes the likeliest token (the lowest id among equals).
        top_p: Keep the fewest likeliest tokens that together hold this share of what top-k left; 1 is off.
        top_k: Keep this many likeliest tokens; 0 is off.
        min_p: Drop tokens less likely than this share of the likeliest; 0 is off.
        seed: Makes the draws repeatable; None draws from the operating system's entropy.
        bad_words: Runs of token ids that the answer does not complete; what the prompt ends in counts.
        log_probabilities: Whether the model's own log-probabilities of the answer are summed up.

    Raises:
        UsageError: a value is not a number or out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    log_probabilities: bool = False

    def __post_init__(self) -> None:
        if not (_real(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature must be a finite number from 0 up, not {self.temperature!r}")
        if not (_real(self.top_p) and 0 < self.top_p <= 1):
            raise UsageError(f"top_p must be a number above 0 and at most 1, not {self.top_p!r}")
        if not (whole(self.top_k) and self.top_k >= 0):
            raise UsageError(f"top_k must be a whole number from 0 (off) up, not {self.top_k!r}")
        if not (_real(self.min_p) and 0 <= self.min_p <= 1):
            raise UsageError(f"min_p must be a number from 0 to 1, not {self.min_p!r}")
        if self.seed is not None and not (whole(self.seed) and self.seed >= 0):
            raise UsageError(f"seed must be a whole number from 0 up, not {self.seed!r}")
        if not all(self.bad_words):
            raise UsageError("a bad word is empty")

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn at random."""
        return self.temperature == 0

    def generator(self) -> np.random.Generator:
        """A fresh source of randomness; the kind is fixed, so that a seed keeps its meaning."""
        return np.random.Generator(np.random.PCG64(self.seed))


def whole(value: object) -> bool:
    """Whether a value is an integer; a truth value is not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def greedy(logits: Floats) -> Ids:
    """The likeliest token of each row of `[R, V]`, `[R]`; the lowest id among equals.

    Raises:
        VerificationError: a logit is not finite.
    """
    _check(logits)
    choice: Ids = logits.argmax(axis=1)
    return choice


def probabilities(logits: Floats, params: SamplingParams) -> Weights:
    """What each row of logits `[R, V]` is drawn from after the filters, `[R, V]` fp64, rows adding up to 1.

    Ties at a filter's edge are kept from the lowest id on. Temperature 0 puts everything on `greedy`'s token.

    Raises:
        VerificationError: a logit is not finite.
    """
    result = np.zeros(logits.shape, dtype=np.float64)
    if params.greedy:
        result[np.arange(len(logits)), greedy(logits)] = 1.0
        return result
    _check(logits)
    for target, row in zip(result, logits, strict=True):
        if 0 < params.top_k < row.size:
            kept = _largest(row, params.top_k)
            target[kept] = _weights(row[kept], params)
        else:
            target[:] = _weights(row, params)
    return result


def without_bad_words(logits: Floats, tokens: Sequence[int], bad_words: Sequence[Sequence[int]]) -> Floats:
    """`logits` `[R, V]` with the last ids of bad words pushed down where the ids before them stand.

    Args:
        logits: Row r says what follows `tokens` without the last R - 1 - r; not changed.
        tokens: The sequence, drafts included.
        bad_words: Runs of ids, none empty; ids outside the vocabulary never come anyway.

    The value is the lowest finite one: exp makes a 0 of it, and it is no sign of a damaged model.
    """
    rows, vocabulary = logits.shape
    banned = logits.copy()
    for row in range(rows):
        end = len(tokens) - (rows - 1 - row)
        for *before, last in bad_words:
            if 0 <= last < vocabulary and list(tokens[max(0, end - len(before)) : end]) == before:
                banned[row, last] = np.finfo(banned.dtype).min
    return banned


def log_probability(logits: Floats, tokens: Sequence[int]) -> float:
    """Sum of the natural logarithms of softmax(row)[token] over the first `len(tokens)` rows of `[R, V]`."""
    total = 0.0
    for row, token in zip(logits, tokens, strict=False):
        scores = row.astype(np.float64)
        top = scores.max()
        total += float(scores[token] - top - np.log(np.exp(scores - top).sum()))
    return total


@dataclass(frozen=True)
class TargetRows:
    """`probabilities` of the rows of `logits` `[R, V]`, each computed when asked for.

    Raises:
        VerificationError: from the access, when a logit of the row is not finite.
    """

    logits: Floats
    params: SamplingParams

    def __getitem__(self, row: int) -> Weights:
        """`[V]` fp64."""
        result: Weights = probabilities(self.logits[row : row + 1], self.params)[0]
        return result


def draw(weights: Weights, rng: np.random.Generator) -> int:
    """One id with probability proportional to `weights` `[V]`; an id of weight 0 is never drawn."""
    cumulative = weights.cumsum()
    # To the right: the first id whose cumulative weight exceeds the point, so its own weight is above 0.
    return int(cumulative.searchsorted(rng.random() * cumulative[-1], side="right"))


def verify(
    drafts: Sequence[int],
    draft_probs: Rows,
    target_probs: Rows,
    rng: np.random.Generator,
) -> tuple[int, int]:
    """Accept a prefix of the drafts and draw the token after it (Leviathan et al., arXiv 2211.17192).

    A draft d is kept with probability min(1, p(d) / q(d)). The first one refused is replaced by a draw from
    max(p - q, 0), renormalised; if none is, the token after the last is drawn from the target. Whatever q is,
    each token is thereby distributed as p. With one-hot rows this is a comparison of ids.

    Args:
        drafts: K ids, drawn from the rows of `draft_probs`.
        draft_probs: `[K, V]`: q.
        target_probs: `[K + 1, V]`: p after 0 .. K of the drafts; rows after a refusal are not asked for.
        rng: Source of the decisions.

    Returns:
        How many drafts stand, and the token that follows them.
    """
    for place, token in enumerate(drafts):
        p, q = target_probs[place], draft_probs[place]
        if rng.random() * q[token] < p[token]:
            continue
        rest = np.maximum(p - q, 0.0)
        # p and q may differ by rounding alone, and then nothing is left to draw from.
        return place, draw(rest if rest.sum() > np.finfo(np.float64).tiny else p, rng)
    return len(drafts), draw(target_probs[len(drafts)], rng)


def verify_greedy(drafts: Sequence[int], targets: Sequence[int] | Ids) -> tuple[int, int]:
    """`verify` where nothing is random: `targets` `[K + 1]` are the decoder's own choices."""
    accepted = 0
    while accepted < len(drafts) and drafts[accepted] == targets[accepted]:
        accepted += 1
    return accepted, int(targets[accepted])


def not_finite() -> VerificationError:
    """What is wrong where a logit is not a finite number."""
    return VerificationError(
        "The model returned logits that are not finite numbers",
        "Run 'step35-trt verify' on the bundle; a damaged weight or an overflowing precision does this.",
    )


def _check(logits: Floats) -> None:
    # A NaN survives min and max, so two reductions see all there is to see.
    if not (math.isfinite(logits.min(initial=0.0)) and math.isfinite(logits.max(initial=0.0))):
        raise not_finite()


def _largest(row: Floats, count: int) -> Ids:
    """Ids of the `count` largest values, ascending.

    The maxima of disjoint groups are values of the row, so the `count`-th largest of them bounds the row's
    from below, and little of a vocabulary is left to select from.
    """
    groups = max(4 * count, 512)
    if row.size > 4 * groups:
        maxima = row[: row.size // groups * groups].reshape(-1, groups).max(axis=0)
        candidates = np.flatnonzero(row >= np.partition(maxima, -count)[-count])
    else:
        candidates = np.arange(row.size)
    values = row[candidates]
    edge = np.partition(values, -count)[-count]
    tied = candidates[values == edge]
    above = candidates[values > edge]
    return np.sort(np.concatenate([above, tied[: count - above.size]]))


def _weights(scores: Floats, params: SamplingParams) -> Weights:
    """Temperature, top-p and min-p over one row, renormalised."""
    weights = scores.astype(np.float64)
    weights -= weights.max()
    with np.errstate(over="ignore"):  # a temperature next to 0 sends all but the largest to exp(-inf)
        weights /= params.temperature
    np.exp(weights, out=weights)
    if params.top_p < 1:
        weights = _nucleus(weights, params.top_p)
    if params.min_p > 0:
        weights[weights < params.min_p] = 0.0  # the largest is 1
    weights /= weights.sum()
    return weights


def _nucleus(weights: Weights, share: float) -> Weights:
    """Zero all but the fewest largest weights that hold `share` of the sum; the largest is 1.

    The bits of positive floats are ordered like the floats, so the exponent and two bits of the mantissa sort
    the weights into bins. Bins above the goal are in whole; only the bin it falls into needs sorting.
    """
    bins = np.minimum(_BIN_OF_ONE - (weights.view(np.int64) >> _BIN_SHIFT), _BINS - 1)
    reached = np.bincount(bins, weights, minlength=_BINS).cumsum()
    goal = share * reached[-1]
    last = int(reached.searchsorted(goal))
    kept = bins < last
    edge = np.flatnonzero(bins == last)
    order = edge[np.argsort(-weights[edge], kind="stable")]
    mass = reached[last - 1] if last else 0.0
    kept[order[: int((mass + weights[order].cumsum()).searchsorted(goal)) + 1]] = True
    return np.where(kept, weights, 0.0)
