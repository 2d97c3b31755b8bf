"""A GPU bundle on the CPU: its program, over networks written anew, with the weights of its files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from step35_trt.dialects.tensorrt_segment import Builder
from step35_trt.errors import CorruptInputError
from step35_trt.gpu_weights import StoredWeights, deployed_forms
from step35_trt.interpret.executor import Executor
from step35_trt.interpret.session import InterpretedSession
from step35_trt.interpret.weights import FormedWeights
from step35_trt.lower import ModelPrograms
from step35_trt.program import SteppedProgram

if TYPE_CHECKING:
    from step35_trt.bundle import Bundle


def stored_session(bundle: Bundle) -> InterpretedSession:
    """The session of an opened GPU bundle; its engines and kernels are not run but what they were made of.

    Raises:
        UnsupportedError: TensorRT-RTX, which writes the networks, is not installed.
        CorruptInputError: the program is not one of this model and recipe.
    """
    program = bundle.program
    assert isinstance(program, SteppedProgram)
    forms, experts = deployed_forms(bundle.manifest.recipe, bundle.config)
    made, builder = ModelPrograms.of(bundle.config, forms), Builder.rtx()
    if made.segments.keys() != program.segments.keys() or experts != program.experts:
        raise CorruptInputError(
            f"the program of {bundle.directory} is not what its model and recipe make with this version",
            "Build it again with this version, or verify it with the one that built it.",
        )
    networks = {key: builder.write(segment, forms) for key, segment in made.segments.items()}
    stored = StoredWeights(bundle.directory, program.weights, program.experts)
    weights = FormedWeights(stored.read, forms)
    chunk = min(bundle.manifest.engine.prefill_chunk, bundle.manifest.max_tokens)
    return InterpretedSession(bundle.config, Executor(networks, weights), program.decoder, program.mtp, chunk)
