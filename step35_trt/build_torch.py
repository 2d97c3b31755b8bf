"""The files of a bundle that torch runs: a program, and each rank's weights in the forms that it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from step35_trt.build_steps import Contents, bytes_step, weights_step
from step35_trt.bundle import PROGRAM
from step35_trt.checkpoint import expected_tensors
from step35_trt.deployment import sharing_of
from step35_trt.errors import UnsupportedError, UsageError
from step35_trt.gpu_weights import GpuWeights, Packing
from step35_trt.lower import ModelPrograms
from step35_trt.program import SteppedProgram
from step35_trt.weight_forms import Forms

if TYPE_CHECKING:
    from step35_trt.checkpoint import Checkpoint
    from step35_trt.engine import EngineSpec
    from step35_trt.quantize.recipe import Recipe

REFERENCE = (
    "segments and plugins run as the torch dialect defines them, in what the recipe computes in: exact, not "
    "fast"
)


def torch_contents(source: Checkpoint, recipe: Recipe, spec: EngineSpec) -> Contents:
    """Every file but the manifest and the tokenizer; what is not coded as the recipe says is rounded to it.

    Segments have no files: what they compute follows from the model and the recipe, and is traced at load.

    Raises:
        UsageError: the engine does not say what machine it is for.
        UnsupportedError: the engine names a GPU, or the devices cannot share the model as it wants.
    """
    if spec.hardware is None:
        raise UsageError(
            f"engine {spec.name} names no machine", "Give its file a line such as hardware: xeon-128g."
        )
    if spec.hardware.compute_capability is not None:
        raise UnsupportedError(
            f"engine {spec.name} names a GPU, and target torch runs on CPUs in this version",
            "Take target tensorrt or tensorrt-rtx for a GPU.",
        )
    forms, sharing = (
        Forms.of(recipe, expected_tensors(source.config)),
        sharing_of(source.config, recipe, spec),
    )
    sharing.check(forms)
    made = ModelPrograms.of(source.config, forms, sharing)
    weights = GpuWeights(forms, {}, sharing, Packing(source, forms, {}, sharing))
    program = SteppedProgram(
        decoder=made.decoder,
        mtp=made.mtp,
        ranges=(),
        segments={},
        kernels=(),
        weights=weights.places,
        experts={},
        ranks=sharing.ranks,
        ways=dict(sharing.ways),
        shares=weights.shares if sharing.ranks > 1 else (),
    )
    steps = [
        *map(weights_step, weights.files.values()),
        bytes_step(PROGRAM, program.model_dump_json().encode()),
    ]
    return Contents(tuple(steps), (REFERENCE,), expected_bytes=sum(step.nbytes for step in steps))
