"""What an engine for a GPU is made of, known from a model's config, a recipe and the engine spec alone.

Whoever builds a bundle, finishes it, checks it or reckons what it will take asks here, so that all of them
speak of the same segments, kernels and forms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from step35_trt.dialects.tensorrt_segment import Profile, profiles
from step35_trt.errors import CorruptInputError, UnsupportedError, UsageError
from step35_trt.gpu_forms import deployed_forms
from step35_trt.kernels.targets import gpu_target
from step35_trt.lower import ModelPrograms
from step35_trt.plan import weight_cost
from step35_trt.plan.splits import Shares
from step35_trt.program import SteppedProgram
from step35_trt.sharing import Sharing

if TYPE_CHECKING:
    from collections.abc import Mapping

    from step35_trt.bundle import Bundle
    from step35_trt.config import Step35Config
    from step35_trt.engine import EngineSpec
    from step35_trt.kernels.targets import GpuTarget
    from step35_trt.kernels.variant import KernelVariant
    from step35_trt.program import ExpertFormat
    from step35_trt.quantize.recipe import Recipe
    from step35_trt.sharing import Part, Way
    from step35_trt.weight_forms import Forms

PAGES = ("bf16", "fp8")  # what attention kernels take keys and values in, as variants are named


@dataclass(frozen=True)
class Deployment:
    """An engine of a model.

    Attributes:
        config: The model.
        recipe: The precisions.
        capability: Compute capability of the GPU, as `9.0`.
        forms: Of the whole model's weights.
        experts: The kernels' format of each layer's experts, by prefix.
        sharing: What each rank does.
        programs: A rank's; they are equal on all ranks, which differ only in their weights.
        ranges: What every segment gets an optimisation profile for.
    """

    config: Step35Config
    recipe: Recipe
    capability: str
    forms: Forms
    experts: Mapping[str, ExpertFormat]
    sharing: Sharing
    programs: ModelPrograms
    ranges: tuple[Profile, ...]

    @classmethod
    def of(cls, config: Step35Config, recipe: Recipe, spec: EngineSpec) -> Deployment:
        """Trace and lower the model; nothing is compiled.

        Raises:
            UsageError: the engine does not say what GPU it is for.
            UnsupportedError: the recipe computes in fp32, or the devices cannot share the model that way.
        """
        if spec.hardware is None or spec.hardware.compute_capability is None:
            raise UsageError(
                f"engine {spec.name} names no GPU", "Give its file a line such as hardware: dgx-spark."
            )
        forms, experts = deployed_forms(recipe, config)
        sharing = sharing_of(config, recipe, spec)
        sharing.check(forms)
        ranges = profiles(spec.max_sequences, spec.draft_tokens, spec.prefill_chunk)
        made = ModelPrograms.of(config, forms, sharing)
        capability = spec.hardware.compute_capability
        return cls(config, recipe, capability, forms, experts, sharing, made, ranges)

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> Deployment:
        """What an opened GPU bundle was made from.

        Raises:
            CorruptInputError: the program is not one of this model and recipe.
        """
        program = bundle.program
        assert isinstance(program, SteppedProgram)
        made = cls.of(bundle.config, bundle.manifest.recipe, bundle.manifest.engine)
        same = (
            made.programs.segments.keys() == program.segments.keys()
            and made.experts == program.experts
            and made.sharing == program.sharing
        )
        if not same:
            raise CorruptInputError(
                f"the program of {bundle.directory} is not what its model and recipe make with this version",
                "Build it again with this version, or use the one that built it.",
            )
        return made

    @property
    def target(self) -> GpuTarget:
        """What kernels are compiled for."""
        return gpu_target("sm_" + self.capability.replace(".", ""))

    def kernels(self) -> list[KernelVariant]:
        """The kernels that the experts' formats, the recipe's cache and the segments ask for.

        A rank's kernels know the heads and the experts that it holds, and how many experts there are.

        Raises:
            UnsupportedError: there are none for this GPU, cache or shapes.
        """
        from step35_trt.kernels import catalogue

        if self.recipe.kv_cache not in PAGES:
            raise UnsupportedError(
                f"recipe {self.recipe.name} keeps keys and values in {self.recipe.kv_cache}, which no kernel "
                "takes",
                f"GPU kernels know {', '.join(PAGES)}.",
            )
        others = {kind for kind in PAGES if kind != self.recipe.kv_cache}
        formats = {None, *self.experts.values()}
        own = self.sharing.config(self.config)
        whole = own.model_copy(update={"moe_num_experts": self.config.moe_num_experts})
        plugins = [
            variant
            for variant in catalogue.deployment(whole, self.target, held=own.moe_num_experts)
            if variant.constants.get("FORMAT") in formats
            and not (variant.plugin == "gated_attention" and others & set(variant.name.split("-")))
        ]
        return plugins + catalogue.dense([self.programs])


def sharing_of(config: Step35Config, recipe: Recipe, spec: EngineSpec) -> Sharing:
    """How the devices of an engine share the model: as it asks for, what is refused being held by all.

    Raises:
        UnsupportedError: attention or the routed experts cannot be shared that way.
    """
    if spec.devices == 1:
        return Sharing()
    shares = Shares.of(config, spec.parallelism, spec.devices, weight_cost.of_recipe(recipe, cpu=False))
    ways: dict[Part, Way] = {}
    for split in shares.splits:
        # What an engine names are its own parts, never the published format that plans add for comparison.
        part: Part = split.part  # type: ignore[assignment]
        if not split.refusal:
            ways[part] = split.way
        elif part in ("attention", "routed experts"):
            raise UnsupportedError(
                f"engine {spec.name} cannot share {part} over {split.ranks} devices: {split.refusal}",
                f"See the splits of: step35-trt plan CHECKPOINT --engine {spec.name}",
            )
    return Sharing(spec.devices, ways)
