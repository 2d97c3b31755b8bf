"""The files of a bundle for TensorRT-RTX: segments compiled without the GPU, kernels, packed weights."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from step35_trt.build_steps import BuildStep, bytes_step, made_step, weights_step
from step35_trt.bundle import KERNELS, PROGRAM, SEGMENTS
from step35_trt.errors import UnsupportedError, UsageError
from step35_trt.gpu_weights import GpuWeights, deployed_forms, not_quantised
from step35_trt.kernels.artefact import digest
from step35_trt.kernels.catalogue import deployment
from step35_trt.kernels.compile import compile_kernels
from step35_trt.kernels.targets import gpu_target
from step35_trt.lower import ModelPrograms
from step35_trt.program import KernelFile, SteppedProgram, TokenRange

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from step35_trt.checkpoint import Checkpoint
    from step35_trt.config import Step35Config
    from step35_trt.dialects.tensorrt_segment import Builder, Profile
    from step35_trt.engine import EngineSpec
    from step35_trt.kernels.artefact import CompiledKernel
    from step35_trt.kernels.targets import GpuTarget
    from step35_trt.kernels.variant import KernelVariant
    from step35_trt.program import ExpertFormat
    from step35_trt.quantize.recipe import Recipe
    from step35_trt.segments import Segment
    from step35_trt.weight_forms import Forms

UNPROVEN = (
    "nothing of this bundle has run on a GPU: `verify` checks the program, the networks and the weights on "
    "the CPU, not the engines and the machine code that were compiled of them"
)
NOT_REPRODUCED = (
    "segments/*.engine: TensorRT-RTX writes a few bytes of them anew in each build; all other files are "
    "reproducible"
)
PAGES = ("bf16", "fp8")  # what attention kernels take keys and values in, as variants are named


def tensorrt_steps(
    source: Checkpoint, recipe: Recipe, spec: EngineSpec
) -> tuple[list[BuildStep], tuple[str, ...]]:
    """Every file but the manifest and the tokenizer, and the manifest's notes; nothing is compiled yet.

    Raises:
        UnsupportedError: TensorRT-RTX or the kernels' compiler is missing, or the checkpoint is not quantised
            as the engine wants it.
        UsageError: the engine does not say what GPU it is for.
    """
    from step35_trt.dialects.tensorrt_segment import Builder, profiles

    if spec.hardware is None or spec.hardware.compute_capability is None:
        raise UsageError(
            f"engine {spec.name} names no GPU", "Give its file a line such as hardware: dgx-spark."
        )
    if spec.devices > 1:
        raise UnsupportedError(f"engine {spec.name} is for {spec.devices} devices; TensorRT-RTX runs on one")
    capability = spec.hardware.compute_capability
    forms, experts = deployed_forms(recipe, source.config)
    _check_quantised(source, forms, spec)
    builder = Builder.rtx()
    made = ModelPrograms.of(source.config, forms)
    ranges = profiles(spec.max_sequences, spec.draft_tokens, spec.prefill_chunk)
    segments = {key: f"{SEGMENTS}/{key}.engine" for key in made.segments}
    target = gpu_target("sm_" + capability.replace(".", ""))
    variants = _needed(source.config, recipe, target, frozenset(experts.values()))
    weights = GpuWeights(source, forms, experts)
    program = SteppedProgram(
        decoder=made.decoder,
        mtp=made.mtp,
        ranges=tuple(TokenRange(least=r.least, mostly=r.mostly, most=r.most) for r in ranges),
        segments=segments,
        kernels=tuple(map(_kernel_file, variants)),
        weights=weights.places,
        experts=experts,
    )
    steps = _kernel_steps(variants, target)
    for key, file in segments.items():
        steps.append(_segment_step(file, builder, made.segments[key], forms, ranges, capability))
    steps += map(weights_step, weights.files.values())
    steps.append(bytes_step(PROGRAM, program.model_dump_json().encode()))
    return steps, _notes(forms, experts)


def _check_quantised(source: Checkpoint, forms: Forms, spec: EngineSpec) -> None:
    name = not_quantised(source, forms)
    if name is not None:
        raise UnsupportedError(
            f"engine {spec.name} takes {name} in {forms.coding(name).kind} (recipe {spec.recipe}), "
            f"and {source.directory} has it in {source.codings[name].kind}",
            f"Quantise it on the way with build-engine --recipe {spec.recipe}, or before with: "
            f"step35-trt quantize {source.directory} -o DIR --recipe {spec.recipe}",
        )


def _needed(
    config: Step35Config, recipe: Recipe, target: GpuTarget, formats: frozenset[str]
) -> list[KernelVariant]:
    """The kernels that the experts' formats and the recipe's cache ask for."""
    if recipe.kv_cache not in PAGES:
        raise UnsupportedError(
            f"recipe {recipe.name} keeps keys and values in {recipe.kv_cache}, which no kernel takes",
            f"GPU kernels know {', '.join(PAGES)}.",
        )
    others = {kind for kind in PAGES if kind != recipe.kv_cache}
    return [
        variant
        for variant in deployment(config, target)
        if variant.constants.get("FORMAT") in (None, *formats)
        and not (variant.plugin == "gated_attention" and others & set(variant.name.split("-")))
    ]


def _stem(variant: KernelVariant) -> str:
    return f"{KERNELS}/{variant.plugin}.{variant.name}"


def _kernel_file(variant: KernelVariant) -> KernelFile:
    return KernelFile(
        plugin=variant.plugin,
        name=variant.name,
        code=f"{_stem(variant)}.cubin",
        launch=f"{_stem(variant)}.json",
        constants=dict(variant.constants),
    )


def _kernel_steps(variants: Sequence[KernelVariant], target: GpuTarget) -> list[BuildStep]:
    """All kernels are compiled together, side by side, when the first one's turn comes."""

    @functools.cache
    def compiled() -> list[CompiledKernel]:
        return compile_kernels(variants, target)

    steps = []
    for i, variant in enumerate(variants):
        stem = _stem(variant)

        def code(i: int = i) -> bytes:
            return compiled()[i].cubin

        def launch(i: int = i, stem: str = stem) -> bytes:
            kernel = compiled()[i]
            name = f"{stem.removeprefix(f'{KERNELS}/')}.cubin"
            facts = kernel.facts.model_copy(update={"digests": {name: digest(kernel.cubin)}})
            return facts.model_dump_json(indent=1).encode()

        steps += [made_step(f"{stem}.cubin", code), made_step(f"{stem}.json", launch)]
    return steps


def _segment_step(
    file: str,
    builder: Builder,
    segment: Segment,
    forms: Forms,
    ranges: tuple[Profile, ...],
    capability: str,
) -> BuildStep:
    return made_step(file, lambda: builder.build(builder.write(segment, forms), ranges, capability).data)


def _notes(forms: Forms, experts: Mapping[str, ExpertFormat]) -> tuple[str, ...]:
    plain = [
        prefix
        for prefix, kind in experts.items()
        if kind == "bf16" and forms.shapes[f"{prefix}.down_proj.weight"][-1] % 128
    ]
    notes = [UNPROVEN, NOT_REPRODUCED]
    if plain:
        notes.append(
            f"experts of {', '.join(plain)} are in bf16: kernels take int4 only in groups of 128 features"
        )
    return tuple(notes)
