"""The files of a bundle for a GPU, made without it: kernels, packed weights, and segments where that can be.

TensorRT-RTX compiles segments for a GPU that is not here. Full TensorRT builds only where it runs: there a
bundle is sealed with all the rest, and `finish.py` compiles its segments on the target.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import TYPE_CHECKING

from step35_trt.build_estimate import RATES, BuildRates, estimate
from step35_trt.build_steps import BuildStep, Contents, bytes_step, made_step, weights_step
from step35_trt.bundle import KERNELS, PROGRAM, SEGMENTS
from step35_trt.deployment import Deployment
from step35_trt.errors import UnsupportedError
from step35_trt.gpu_forms import not_quantised
from step35_trt.gpu_weights import GpuWeights, Packing
from step35_trt.kernels.artefact import digest
from step35_trt.kernels.compile import compile_kernels
from step35_trt.program import KernelFile, SteppedProgram, TokenRange
from step35_trt.progress import silent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from step35_trt.checkpoint import Checkpoint
    from step35_trt.dialects.tensorrt_segment import Builder
    from step35_trt.engine import EngineSpec
    from step35_trt.kernels.artefact import CompiledKernel
    from step35_trt.kernels.targets import GpuTarget
    from step35_trt.kernels.variant import KernelVariant
    from step35_trt.progress import Progress
    from step35_trt.quantize.recipe import Recipe
    from step35_trt.weight_forms import Forms

UNPROVEN = (
    "nothing of this bundle has run on a GPU: `verify` checks the program, the networks and the weights on "
    "the CPU, not the engines and the machine code that were compiled of them"
)
NOT_REPRODUCED = (
    "segments/*.engine: TensorRT-RTX writes a few bytes of them anew in each build; all other files are "
    "reproducible"
)
FINISHED_THERE = (
    "segments/*.engine are compiled on the target: TensorRT times kernels there and takes the fastest, so "
    "two machines need not make the same bytes"
)
WIDENED = (
    "FP8 weights are dequantised in front of their products, which take bf16 activations (W8A16): the "
    "recipe's FP8 activations are not used"
)
DEALT = (
    "kernels of the experts are compiled for those that a rank holds: ids are counted from the rank's first, "
    "and what other ranks hold has weight 0"
)


def gpu_contents(source: Checkpoint, recipe: Recipe, spec: EngineSpec) -> Contents:
    """Every file but the manifest and the tokenizer; nothing is compiled yet.

    Raises:
        UnsupportedError: TensorRT-RTX or the kernels' compiler is missing, or the checkpoint is not quantised
            as the engine wants it, or the devices cannot share the model as it wants.
        UsageError: the engine does not say what GPU it is for.
    """
    if spec.target == "tensorrt-rtx" and spec.devices > 1:
        raise UnsupportedError(f"engine {spec.name} is for {spec.devices} devices; TensorRT-RTX runs on one")
    if find_spec("triton") is None:
        raise UnsupportedError(
            "Triton, which compiles the kernels, is not installed", "pip install 'step35-trt[kernels]'"
        )
    deployment = Deployment.of(source.config, recipe, spec)
    _check_quantised(source, deployment.forms, spec)
    made, sharing, variants = deployment.programs, deployment.sharing, deployment.kernels()
    packing = Packing(source, deployment.forms, deployment.experts, sharing)
    weights = GpuWeights(deployment.forms, deployment.experts, sharing, packing)
    segments = {key: f"{SEGMENTS}/{key}.engine" for key in made.segments}
    program = SteppedProgram(
        decoder=made.decoder,
        mtp=made.mtp,
        ranges=tuple(TokenRange(least=r.least, mostly=r.mostly, most=r.most) for r in deployment.ranges),
        segments=segments,
        kernels=tuple(map(_kernel_file, variants)),
        weights=weights.places,
        experts=dict(deployment.experts),
        ranks=sharing.ranks,
        ways=dict(sharing.ways),
        shares=weights.shares if sharing.ranks > 1 else (),
    )
    steps = _kernel_steps(variants, deployment.target)
    later: tuple[str, ...] = ()
    if spec.target == "tensorrt-rtx":
        from step35_trt.dialects.tensorrt_segment import Builder

        builder = Builder.rtx()
        steps += [_segment_step(file, builder, deployment, key) for key, file in segments.items()]
    else:
        later = tuple(segments.values())
    steps += map(weights_step, weights.files.values())
    steps.append(bytes_step(PROGRAM, program.model_dump_json().encode()))
    expected = estimate(deployment, spec, BuildRates.load(RATES))
    notes = _notes(deployment, spec)
    return Contents(tuple(steps), notes, later, expected.nbytes, expected.sentence)


def compile_segment(deployment: Deployment, key: str, builder: Builder, progress: Progress = silent) -> bytes:
    """The engine of a segment of an engine's programs.

    Raises:
        UnsupportedError: this TensorRT cannot build it.
        KeyboardInterrupt: the user ended it.
    """
    written = builder.write(deployment.programs.segments[key], deployment.programs.forms)
    return builder.build(written, deployment.ranges, deployment.capability, progress).data


def _check_quantised(source: Checkpoint, forms: Forms, spec: EngineSpec) -> None:
    name = not_quantised(source, forms)
    if name is not None:
        raise UnsupportedError(
            f"engine {spec.name} takes {name} in {forms.coding(name).kind} (recipe {spec.recipe}), "
            f"and {source.directory} has it in {source.codings[name].kind}",
            f"Quantise it on the way with build-engine --recipe {spec.recipe}, or before with: "
            f"step35-trt quantize {source.directory} -o DIR --recipe {spec.recipe}",
        )


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


def _segment_step(file: str, builder: Builder, deployment: Deployment, key: str) -> BuildStep:
    return made_step(file, lambda: compile_segment(deployment, key, builder))


def _notes(deployment: Deployment, spec: EngineSpec) -> tuple[str, ...]:
    forms = deployment.forms
    plain = [
        prefix
        for prefix, kind in deployment.experts.items()
        if kind == "bf16" and forms.shapes[f"{prefix}.down_proj.weight"][-1] % 128
    ]
    notes = [UNPROVEN, NOT_REPRODUCED if spec.target == "tensorrt-rtx" else FINISHED_THERE]
    if deployment.recipe.activations == "fp8":
        notes.append(WIDENED)
    if plain:
        notes.append(
            f"experts of {', '.join(plain)} are in bf16: kernels take int4 only in groups of 128 features"
        )
    if deployment.sharing.ways.get("routed experts") == "expert":
        notes.append(DEALT)
    return tuple(notes)
