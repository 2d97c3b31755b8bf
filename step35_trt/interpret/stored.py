"""A GPU bundle on the CPU: its programs, over networks written anew, with the weights of its files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from step35_trt.deployment import Deployment
from step35_trt.dialects.tensorrt_segment import Builder
from step35_trt.gpu_weights import StoredWeights
from step35_trt.interpret.executor import Executor
from step35_trt.interpret.ranks import Meeting, RankedSession
from step35_trt.interpret.session import InterpretedSession
from step35_trt.interpret.weights import FormedWeights
from step35_trt.program import SteppedProgram

if TYPE_CHECKING:
    from step35_trt.bundle import Bundle


def stored_session(bundle: Bundle) -> RankedSession:
    """The session of an opened GPU bundle; its engines and kernels are not run but what they were made of.

    So a bundle whose segments are still to be compiled is no different here.

    Raises:
        UnsupportedError: TensorRT-RTX, which writes the networks, is not installed.
        CorruptInputError: the program is not one of this model and recipe.
    """
    program = bundle.program
    assert isinstance(program, SteppedProgram)
    made, builder = Deployment.of_bundle(bundle), Builder.rtx()
    own = made.programs.forms
    networks = {key: builder.write(segment, own) for key, segment in made.programs.segments.items()}
    chunk = min(bundle.manifest.engine.prefill_chunk, bundle.manifest.max_tokens)
    meeting = Meeting(program.ranks)

    def session(rank: int) -> InterpretedSession:
        places, sharing = program.places(rank), made.sharing
        stored = StoredWeights(bundle.directory, places, program.experts, sharing, rank)
        weights = FormedWeights(stored.read, made.forms, sharing, rank)
        executor = Executor(networks, weights, meeting.exchange(rank))
        return InterpretedSession(bundle.config, executor, program.decoder, program.mtp, chunk)

    return RankedSession(tuple(session(rank) for rank in range(program.ranks)), meeting)
