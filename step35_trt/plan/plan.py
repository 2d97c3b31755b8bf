"""A plan: what an engine of a model holds, whether that fits, what does instead, and how fast it could be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from step35_trt.build_estimate import estimate_build
from step35_trt.errors import UnsupportedError
from step35_trt.plan import weight_cost
from step35_trt.plan.fitting import Limits, alternatives, most_sequences
from step35_trt.plan.memory import WORKSPACE_FORMULA, Footprint, kv_bytes, weigh
from step35_trt.plan.parameters import MTP_GROUPS, count_groups, parameters
from step35_trt.plan.roofline import Roofline
from step35_trt.plan.splits import Shares, possible_splits
from step35_trt.runtime.cache.cache_extent import page_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from step35_trt.build_estimate import BuildEstimate
    from step35_trt.config import Step35Config
    from step35_trt.engine import EngineSpec
    from step35_trt.hardware import Hardware
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
    footprint = Footprint.of_engine(config, spec)
    _check_splits(spec, footprint.shares)
    limits = Limits.of(config, spec)
    memory = limits.memory(footprint)
    build, not_built = _build(config, spec)
    contexts = _contexts(config, KV_CONTEXTS)
    return Plan(
        config=config,
        spec=spec,
        hardware=footprint.hardware,
        footprint=footprint,
        roofline=Roofline.of(footprint, footprint.hardware.bandwidth),
        limits=limits,
        parameters=count_groups(parameters(config)),
        weights=footprint.weights,
        formats=_formats(config),
        memory=memory,
        alternatives=alternatives(footprint, limits) if memory.free < 0 else (),
        reach=tuple(Reach(c, most_sequences(footprint, c, limits.drafts)) for c in contexts),
        caches=tuple(_cache(config, c, footprint.kv_bytes) for c in contexts),
        kv_bytes=footprint.kv_bytes,
        acceptance=tuple(acceptance),
        speeds=_speeds(footprint, acceptance),
        shares=footprint.shares,
        splits=possible_splits(config, SPLIT_RANKS, footprint.cost_of),
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


def _check_splits(spec: EngineSpec, shares: Shares) -> None:
    for split in shares.splits:
        if split.refusal and split.part in ("attention", "routed experts"):
            other = "experts: expert" if split.way == "tensor" and split.part != "attention" else ""
            raise UnsupportedError(
                f"engine {spec.name} cannot share {split.part} over {split.ranks} devices: {split.refusal}",
                f"Share them whole, {other}." if other else "Take another number of devices.",
            )


def _contexts(config: Step35Config, wanted: Sequence[int]) -> tuple[int, ...]:
    longest = config.max_position_embeddings
    return tuple(sorted({min(context, longest) for context in wanted}))


def _formats(config: Step35Config) -> tuple[FormatBytes, ...]:
    found = []
    for name, cost_of in weight_cost.PUBLISHED_FORMATS.items():
        weights = weigh(config, cost_of, Shares.whole(config))
        main = sum(w.nbytes for w in weights if w.group not in MTP_GROUPS)
        found.append(FormatBytes(name, main, sum(w.nbytes for w in weights)))
    return tuple(found)


def _cache(config: Step35Config, context: int, value_bytes: int) -> CacheBytes:
    layers = config.layers
    all_full = sum(2 * layer.kv_heads * layer.head_dim for layer in layers) * context * value_bytes
    return CacheBytes(context, kv_bytes(layers, context, value_bytes), all_full)


def _speeds(footprint: Footprint, acceptance: Sequence[float]) -> tuple[Speed, ...]:
    config, reachable = footprint.config, footprint.hardware.reachable_bandwidth
    roofline = Roofline.of(footprint, footprint.hardware.bandwidth)
    reached = Roofline.of(footprint, reachable) if reachable else None
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
        f"{footprint.config.sliding_window} tokens, on a GPU in pages of {page_rows()} tokens, of which it "
        "also keeps some that ended sequences left.",
        f"Workspace: {WORKSPACE_FORMULA}.",
    ]
    if footprint.hardware.reserved:
        found.append("What memory is left alone for is an assumption of the hardware file, not a fact.")
    if footprint.spec.devices > 1:
        found.append(
            "Experts are spread evenly over the devices, and sums over the devices cost the link's bandwidth "
            "but no latency: at one sequence real steps are slower than this."
        )
    return tuple(found)
