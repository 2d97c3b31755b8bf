"""A plan: what an engine of a model holds, whether that fits, what does instead, and how fast it could be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from step35_trt.build_estimate import estimate_build
from step35_trt.engine import EngineSpec
from step35_trt.errors import UnsupportedError, UsageError
from step35_trt.plan import coding
from step35_trt.plan.memory import WORKSPACE_FORMULA, Footprint, kv_bytes, weigh
from step35_trt.plan.parameters import MTP_GROUPS, count_groups, parameters
from step35_trt.plan.roofline import Roofline
from step35_trt.plan.splits import Shares, possible_splits
from step35_trt.quantize.recipe import Recipe
from step35_trt.resources import known

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from step35_trt.build_estimate import BuildEstimate
    from step35_trt.config import Step35Config
    from step35_trt.hardware import Hardware
    from step35_trt.plan.coding import Coder
    from step35_trt.plan.memory import GroupBytes, Memory
    from step35_trt.plan.parameters import GroupCount
    from step35_trt.plan.roofline import Step
    from step35_trt.plan.splits import Split

# What the modules' acceptance is taken to be unless the caller knows better: the middle of what is told.
ACCEPTANCE = (0.85, 0.75, 0.65)
BATCHES = (1, 8, 64)
SPEED_CONTEXTS = (8192, 65536)
KV_CONTEXTS = (8192, 32768, 65536, 131072, 262144)
SPLIT_RANKS = (2, 3, 4, 5, 8, 16)
MOST_SEQUENCES = 1024
LEAST_CONTEXT = 1024  # a shorter one is no use to suggest


@dataclass(frozen=True)
class Limits:
    """Tokens of a sequence, sequences at once, MTP modules used."""

    context: int
    sequences: int
    drafts: int


@dataclass(frozen=True)
class FormatBytes:
    """Weights in one of the formats that the specification tabulates (7.2), the modules in BF16."""

    name: str
    main: int
    with_modules: int


@dataclass(frozen=True)
class CacheBytes:
    """Keys and values of one sequence of the decoder, on all devices together.

    `all_full` is what they would be if window layers kept every token.
    """

    context: int
    nbytes: int
    all_full: int


@dataclass(frozen=True)
class Reach:
    """The most sequences of a context that fit; 0 where not even one does."""

    context: int
    sequences: int


@dataclass(frozen=True)
class Speed:
    """A projected step, and whether its batch fits the memory.

    `reachable` is tokens per second at the bandwidth that kernels have been seen to reach, if known.
    """

    step: Step
    fits: bool
    reachable: float | None


@dataclass(frozen=True)
class Plan:
    """Everything is a projection from the config and the engine spec.

    `build` is there for a GPU's engine, unless `not_built` says why this version makes none.
    """

    config: Step35Config
    spec: EngineSpec
    hardware: Hardware
    footprint: Footprint
    roofline: Roofline
    limits: Limits
    parameters: tuple[GroupCount, ...]
    weights: tuple[GroupBytes, ...]
    formats: tuple[FormatBytes, ...]
    memory: Memory
    alternatives: tuple[str, ...]
    reach: tuple[Reach, ...]
    caches: tuple[CacheBytes, ...]
    kv_bytes: int
    acceptance: tuple[float, ...]
    speeds: tuple[Speed, ...]
    shares: Shares
    splits: tuple[Split, ...]
    build: BuildEstimate | None
    not_built: str
    assumptions: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the engine's own limits fit its memory."""
        return self.memory.free >= 0

    @property
    def parameter_count(self) -> int:
        """Of the main model, without the MTP modules."""
        return sum(count.parameters for count in self.parameters if count.group not in MTP_GROUPS)

    @property
    def active_parameters(self) -> int:
        """Of the main model, read for one token: the chosen experts, and no embedding."""
        counts = {count.group: count.parameters for count in self.parameters}
        routed = counts.get("routed experts", 0)
        idle = routed - routed * self.config.moe_top_k // self.config.moe_num_experts
        return self.parameter_count - counts["embedding"] - idle


def make_plan(config: Step35Config, spec: EngineSpec, acceptance: Sequence[float] = ACCEPTANCE) -> Plan:
    """Plan an engine.

    Raises:
        UsageError: the engine names no hardware.
        UnsupportedError: it shares attention or experts in a way that cannot be.
    """
    hardware = spec.hardware
    if hardware is None:
        raise UsageError(f"engine {spec.name} names no hardware to plan for")
    recipe = Recipe.load(spec.recipe)
    coder = coding.of_recipe(recipe, cpu=spec.target == "cpu")
    footprint = _footprint(config, spec, recipe, coder)
    _check_splits(spec, footprint.shares)
    limits = _limits(config, spec)
    memory = footprint.at(limits.context, limits.sequences, limits.drafts)
    build, not_built = _build(config, spec)
    contexts = _contexts(config, KV_CONTEXTS)
    return Plan(
        config=config,
        spec=spec,
        hardware=hardware,
        footprint=footprint,
        roofline=Roofline.of(footprint, coder, hardware, hardware.bandwidth),
        limits=limits,
        parameters=count_groups(parameters(config)),
        weights=footprint.weights,
        formats=_formats(config),
        memory=memory,
        alternatives=_alternatives(footprint, limits) if memory.free < 0 else (),
        reach=tuple(Reach(c, most_sequences(footprint, c, limits.drafts)) for c in contexts),
        caches=tuple(_cache(config, c, footprint.kv_bytes) for c in contexts),
        kv_bytes=footprint.kv_bytes,
        acceptance=tuple(acceptance),
        speeds=_speeds(footprint, coder, acceptance),
        shares=footprint.shares,
        splits=possible_splits(config, SPLIT_RANKS, coder),
        build=build,
        not_built=not_built,
        assumptions=_assumptions(footprint, acceptance),
    )


def _build(config: Step35Config, spec: EngineSpec) -> tuple[BuildEstimate | None, str]:
    """What building it takes, or why it is not built."""
    if spec.target in ("cpu", "torch"):
        return None, ""
    try:
        return estimate_build(config, spec), ""
    except UnsupportedError as error:
        return None, error.message


def most_sequences(footprint: Footprint, context: int, drafts: int) -> int:
    """The most sequences of `context` tokens that fit, up to `MOST_SEQUENCES`."""
    return _largest(MOST_SEQUENCES, lambda n: footprint.at(context, n, drafts).free >= 0)


def longest_context(footprint: Footprint, sequences: int, drafts: int) -> int:
    """The longest context that so many sequences can have; 0 where none fits."""
    most = footprint.config.max_position_embeddings
    return _largest(most, lambda n: footprint.at(n, sequences, drafts).free >= 0)


def _largest(most: int, holds: Callable[[int], bool]) -> int:
    """The largest number up to `most` for which a condition holds that holds for all smaller ones."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _footprint(config: Step35Config, spec: EngineSpec, recipe: Recipe, coder: Coder) -> Footprint:
    shares = Shares.of(config, spec.parallelism, spec.devices, coder)
    return Footprint.of(config, spec, coder, shares, coding.kv_value_bytes(recipe))


def _check_splits(spec: EngineSpec, shares: Shares) -> None:
    for split in shares.splits:
        if split.refusal and split.part in ("attention", "routed experts"):
            other = "experts: expert" if split.way == "tensor" and split.part != "attention" else ""
            raise UnsupportedError(
                f"engine {spec.name} cannot share {split.part} over {split.ranks} devices: {split.refusal}",
                f"Share them whole, {other}." if other else "Take another number of devices.",
            )


def _limits(config: Step35Config, spec: EngineSpec) -> Limits:
    longest = config.max_position_embeddings
    drafts = min(spec.draft_tokens, config.num_nextn_predict_layers)
    context = min(spec.max_tokens or longest, longest)
    sequences = max(spec.max_sequences, (spec.cache_tokens or 0) // context)
    return Limits(context, sequences, drafts)


def _contexts(config: Step35Config, wanted: Sequence[int]) -> tuple[int, ...]:
    longest = config.max_position_embeddings
    return tuple(sorted({min(context, longest) for context in wanted}))


def _formats(config: Step35Config) -> tuple[FormatBytes, ...]:
    found = []
    for name, coder in coding.PUBLISHED_FORMATS.items():
        weights = weigh(config, coder, Shares.whole(config))
        main = sum(w.nbytes for w in weights if w.group not in MTP_GROUPS)
        found.append(FormatBytes(name, main, sum(w.nbytes for w in weights)))
    return tuple(found)


def _cache(config: Step35Config, context: int, value_bytes: int) -> CacheBytes:
    layers = config.layers
    all_full = sum(2 * layer.kv_heads * layer.head_dim for layer in layers) * context * value_bytes
    return CacheBytes(context, kv_bytes(layers, context, value_bytes), all_full)


def _alternatives(footprint: Footprint, limits: Limits) -> tuple[str, ...]:
    """The nearest engines that fit: this one with smaller limits, then other shipped ones with the same."""
    spec, found = footprint.spec, []
    if (context := longest_context(footprint, limits.sequences, limits.drafts)) >= LEAST_CONTEXT:
        found.append(f"{spec.name} with max_tokens {context} and max_sequences {limits.sequences}")
    if sequences := most_sequences(footprint, limits.context, limits.drafts):
        found.append(f"{spec.name} with max_sequences {sequences} and max_tokens {limits.context}")
    for drafts in range(limits.drafts - 1, -1, -1):
        if footprint.at(limits.context, limits.sequences, drafts).free >= 0:
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
        recipe = Recipe.load(other.recipe)
        coder = coding.of_recipe(recipe, cpu=other.target == "cpu")
        memory = _footprint(footprint.config, other, recipe, coder).at(
            limits.context, limits.sequences, limits.drafts
        )
        if memory.free >= 0:
            where = f"{other.devices} x {other.hardware.name}"
            fitting.append((other.devices * other.hardware.memory, f"{name} on {where}, with these limits"))
    return [text for _, text in sorted(fitting)]


def _speeds(footprint: Footprint, coder: Coder, acceptance: Sequence[float]) -> tuple[Speed, ...]:
    config, hardware = footprint.config, footprint.spec.hardware
    assert hardware is not None
    roofline = Roofline.of(footprint, coder, hardware, hardware.bandwidth)
    reached = (
        Roofline.of(footprint, coder, hardware, hardware.reachable_bandwidth)
        if hardware.reachable_bandwidth
        else None
    )
    contexts = _contexts(config, (*SPEED_CONTEXTS, config.max_position_embeddings))
    found = []
    for context in contexts:
        for sequences in BATCHES:
            for drafts in range(config.num_nextn_predict_layers + 1):
                case = sequences, context, drafts
                found.append(
                    Speed(
                        roofline.step(*case, acceptance),
                        footprint.at(context, sequences, drafts).free >= 0,
                        reached.step(*case, acceptance).tokens_per_second if reached else None,
                    )
                )
    return tuple(found)


def _assumptions(footprint: Footprint, acceptance: Sequence[float]) -> tuple[str, ...]:
    hardware = footprint.spec.hardware
    assert hardware is not None
    found = [
        "Every figure is computed from config.json and the engine spec. Nothing was measured, and no engine "
        "reaches its roofline.",
        "A step's time is the bytes that it reads over the published bandwidth, or its multiply-adds over "
        "the published dense rate where that is longer. Activations, launches and sampling count nothing.",
        "Tokens choose experts evenly and independently of each other: the worst case for drafting, since "
        "neighbouring tokens share experts.",
        f"MTP modules 1, 2, ... are right with {', '.join(f'{rate:g}' for rate in acceptance)}, each where "
        "the one before it was.",
        f"Keys and values take {footprint.kv_bytes} bytes a number; window layers keep "
        f"{footprint.config.sliding_window} tokens.",
        f"Workspace: {WORKSPACE_FORMULA}.",
    ]
    if hardware.reserved:
        found.append("What memory is left alone for is an assumption of the hardware file, not a fact.")
    if footprint.spec.devices > 1:
        found.append(
            "Experts are spread evenly over the devices, and sums over the devices cost the link's bandwidth "
            "but no latency: at one sequence real steps are slower than this."
        )
    return tuple(found)
