"""What fits a memory: the limits an engine has, the most it could have, and the nearest engines that fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from step35_trt.engine import EngineSpec
from step35_trt.plan.memory import Footprint
from step35_trt.resources import known

if TYPE_CHECKING:
    from collections.abc import Callable

    from step35_trt.config import Step35Config
    from step35_trt.plan.memory import Memory

MOST_SEQUENCES = 1024
LEAST_CONTEXT = 1024  # a shorter one is no use to suggest


@dataclass(frozen=True)
class Limits:
    """Tokens of a sequence, sequences at once, MTP modules used, and tokens of all sequences together.

    `cached` is None where all may have the greatest length.
    """

    context: int
    sequences: int
    drafts: int
    cached: int | None = None

    @classmethod
    def of(cls, config: Step35Config, spec: EngineSpec) -> Limits:
        """What an engine is laid out for."""
        longest = config.max_position_embeddings
        drafts = min(spec.draft_tokens, config.num_nextn_predict_layers)
        context = min(spec.max_tokens or longest, longest)
        if spec.target == "cpu":  # where nothing else bounds how many there are
            return cls(context, max(spec.max_sequences, (spec.cache_tokens or 0) // context), drafts)
        return cls(context, spec.max_sequences, drafts, spec.cache_tokens)

    def memory(self, footprint: Footprint) -> Memory:
        """What they take of one device."""
        return footprint.at(self.context, self.sequences, self.drafts, self.cached)


def most_sequences(footprint: Footprint, context: int, drafts: int) -> int:
    """The most sequences of `context` tokens that fit, up to `MOST_SEQUENCES`."""
    return _largest(MOST_SEQUENCES, lambda n: footprint.at(context, n, drafts).free >= 0)


def longest_context(footprint: Footprint, sequences: int, drafts: int) -> int:
    """The longest context that so many sequences can have; 0 where none fits."""
    most = footprint.config.max_position_embeddings
    return _largest(most, lambda n: footprint.at(n, sequences, drafts).free >= 0)


def _most_cached(footprint: Footprint, limits: Limits) -> int | None:
    """The most tokens that all sequences can have together; None where nobody shares pages."""
    if footprint.spec.target in ("cpu", "torch"):
        return None
    most = limits.cached or limits.sequences * limits.context
    return _largest(most, lambda n: replace(limits, cached=n).memory(footprint).free >= 0)


def _largest(most: int, holds: Callable[[int], bool]) -> int:
    """The largest number up to `most` for which a condition holds that holds for all smaller ones."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def alternatives(footprint: Footprint, limits: Limits) -> tuple[str, ...]:
    """The nearest engines that fit: this one with smaller limits, then other shipped ones with the same."""
    spec, found = footprint.spec, []
    if (context := longest_context(footprint, limits.sequences, limits.drafts)) >= LEAST_CONTEXT:
        found.append(f"{spec.name} with max_tokens {context} and max_sequences {limits.sequences}")
    if sequences := most_sequences(footprint, limits.context, limits.drafts):
        found.append(f"{spec.name} with max_sequences {sequences} and max_tokens {limits.context}")
    shared = replace(limits, cached=_most_cached(footprint, limits))
    if shared.cached is not None and shared.cached >= LEAST_CONTEXT:
        found.append(f"{spec.name} with cache_tokens {shared.cached} and everything else as it is")
    for drafts in range(limits.drafts - 1, -1, -1):
        if replace(limits, drafts=drafts).memory(footprint).free >= 0:
            found.append(f"{spec.name} with draft_tokens {drafts} and everything else as it is")
            break
    return (*found, *_other_engines(footprint, limits))


def _other_engines(footprint: Footprint, limits: Limits) -> list[str]:
    """Shipped engines that hold the same limits, those with the least memory first."""
    fitting = []
    for name in known("engines"):
        other = EngineSpec.load(name)
        if other.hardware is None or other.name == footprint.spec.name:
            continue
        if limits.memory(Footprint.of_engine(footprint.config, other)).free >= 0:
            where = f"{other.devices} x {other.hardware.name}"
            fitting.append((other.devices * other.hardware.memory, f"{name} on {where}, with these limits"))
    return [text for _, text in sorted(fitting)]
