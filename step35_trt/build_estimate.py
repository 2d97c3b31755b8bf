"""What a build for a GPU will make, and about how long it will take: said before it starts, and by `plan`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat

from step35_trt.deployment import Deployment
from step35_trt.gpu_weights import GpuWeights
from step35_trt.quantize.recipe import Recipe
from step35_trt.resources import load_yaml

if TYPE_CHECKING:
    from step35_trt.config import Step35Config
    from step35_trt.engine import EngineSpec

RATES = "two-cores"


class BuildRates(BaseModel):
    """How fast a machine builds, measured: a file of `engines/build-rates/`.

    Attributes:
        machine: What it was measured on.
        source: Where the measurement is written down.
        packing: Stored bytes per second by the kernels' format of the experts; `dense` for all other
            weights. Reading, packing, writing, syncing and the digest are in it.
        segment_seconds: To compile one, by target; a target that is absent was not measured.
        segment_bytes: Of one compiled segment.
        kernel_seconds: To compile one.
        kernel_bytes: Of one, its launch metadata included.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    machine: str
    source: str
    packing: dict[str, PositiveFloat] = Field(min_length=1)
    segment_seconds: dict[str, PositiveFloat]
    segment_bytes: NonNegativeInt
    kernel_seconds: PositiveFloat
    kernel_bytes: NonNegativeInt

    @classmethod
    def load(cls, name: str) -> BuildRates:
        """Shipped rates by name, or a YAML file by path."""
        return load_yaml(cls, "engines/build-rates", name)


@dataclass(frozen=True)
class Part:
    """One kind of file of a bundle.

    Attributes:
        what: For people.
        count: How many.
        nbytes: Together; exact for weights, from measured averages for what is compiled.
        seconds: To make them on the machine of the rates; None where that was not measured.
        later: Made by `build-engine --finish` on the target, not by the build.
    """

    what: str
    count: int
    nbytes: int
    seconds: float | None
    later: bool = False


@dataclass(frozen=True)
class BuildEstimate:
    """A build, before it starts.

    Attributes:
        parts: In the order in which they are made.
        ranks: Devices that the bundle is for; weights are those of all of them.
        machine: What the times are of.
        source: Where they were measured.
    """

    parts: tuple[Part, ...]
    ranks: int
    machine: str
    source: str

    @property
    def nbytes(self) -> int:
        """Disk that the bundle takes, the finishing step included."""
        return sum(part.nbytes for part in self.parts)

    @property
    def seconds(self) -> float:
        """Of the build alone, without what is made on the target; what was not measured counts nothing."""
        return sum(part.seconds or 0.0 for part in self.parts if not part.later)

    @property
    def sentence(self) -> str:
        """What is said before a build."""
        found = [f"{part.count} {part.what}" for part in self.parts if part.count and not part.later]
        minutes = max(1, round(self.seconds / 60))
        later = (f"; {part.count} {part.what} are left for the target" for part in self.parts if part.later)
        return (
            f"{', '.join(found)}: {self.nbytes / 1e9:.2f} GB, about {minutes} min on {self.machine} "
            f"(projected){''.join(later)}"
        )


def estimate_build(config: Step35Config, spec: EngineSpec, rates: BuildRates | None = None) -> BuildEstimate:
    """What building an engine for a GPU makes; reads no weights and needs no compiler.

    Args:
        config: The model.
        spec: An engine whose target is not the CPU.
        rates: How fast the machine is; None: the shipped rates.

    Raises:
        UsageError: the engine does not say what GPU it is for.
        UnsupportedError: there is no such engine of this model.
    """
    rates = rates or BuildRates.load(RATES)
    return estimate(Deployment.of(config, Recipe.load(spec.recipe), spec), spec, rates)


def estimate(deployment: Deployment, spec: EngineSpec, rates: BuildRates) -> BuildEstimate:
    """As `estimate_build`, of what is known already."""
    kernels = len(deployment.kernels())
    segments = len(deployment.programs.segments)
    each = rates.segment_seconds.get(spec.target)
    later = spec.target == "tensorrt"
    dense, experts = _weights(deployment)
    parts = [
        Part("kernels", kernels, kernels * rates.kernel_bytes, kernels * rates.kernel_seconds),
        Part("segments", segments, segments * rates.segment_bytes, each and segments * each, later),
        Part("files of dense weights", len(dense), sum(dense), sum(dense) / rates.packing["dense"]),
    ]
    for kind, sizes in experts.items():
        # A form that was not measured takes as long as the slowest that was.
        rate = rates.packing.get(kind, min(rates.packing.values()))
        parts.append(Part(f"stacks of experts in {kind}", len(sizes), sum(sizes), sum(sizes) / rate))
    return BuildEstimate(tuple(parts), deployment.sharing.ranks, rates.machine, rates.source)


def _weights(deployment: Deployment) -> tuple[list[int], dict[str, list[int]]]:
    """Bytes on disk of the weights: of each file without experts, and of each stack of them by format."""
    laid = GpuWeights(deployment.forms, deployment.experts, deployment.sharing, None)
    sizes = {name: file.size for name, file in laid.files.items()}
    stacks: dict[tuple[str, str], int] = {}
    for held in (laid.places, *laid.shares):
        for name, place in held.items():
            prefix = name.rsplit(".moe.", 1)[0] + ".moe"
            if prefix in deployment.experts and "_proj.weight" in name:
                key = deployment.experts[prefix], f"{prefix} {place.file}"
                stacks[key] = stacks.get(key, 0) + place.nbytes
                sizes[place.file] -= place.nbytes
    experts: dict[str, list[int]] = {}
    for (kind, _), nbytes in stacks.items():
        experts.setdefault(kind, []).append(nbytes)
    return list(sizes.values()), experts
