"""From a checkpoint or a bundle for torch to what a rank runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from step35_trt.checkpoint import expected_tensors
from step35_trt.errors import CorruptInputError
from step35_trt.gpu_weights import StoredWeights
from step35_trt.lower import ModelPrograms
from step35_trt.program import SteppedProgram
from step35_trt.runtime.placement import Placement
from step35_trt.runtime.programs.leading import follow
from step35_trt.runtime.programs.program_torch import TorchExecutor, refuse
from step35_trt.runtime.programs.program_weights import ProgramWeights, checkpoint_share, stored_share
from step35_trt.runtime.programs.rank_runner import RankRunner
from step35_trt.runtime.programs.ranks import Ranks
from step35_trt.runtime.programs.torch_segments import TorchSegments
from step35_trt.runtime.session_program import ProgramSession
from step35_trt.sharing import ALONE
from step35_trt.weight_forms import Forms

if TYPE_CHECKING:
    from step35_trt.bundle import Bundle
    from step35_trt.checkpoint import Checkpoint
    from step35_trt.runtime.programs.program_weights import Share
    from step35_trt.sharing import Sharing


def checkpoint_runner(
    checkpoint: Checkpoint, forms: Forms, sharing: Sharing = ALONE, ranks: Ranks | None = None
) -> RankRunner:
    """A rank's share of a checkpoint, nothing being built.

    Args:
        checkpoint: Read by every rank for itself.
        forms: Of the whole weights; what is not coded so is rounded to nearest.
        sharing: What ranks hold.
        ranks: The others; None where there are none.

    Raises:
        UnsupportedError: the model cannot be cut so.
    """
    sharing.check(forms)
    made = ModelPrograms.of(checkpoint.config, forms, sharing)
    share = checkpoint_share(checkpoint, forms, sharing, ranks.rank if ranks else 0)
    return _runner(made, share, ranks)


def open_program(bundle: Bundle) -> ProgramSession:
    """The session of a bundle for torch, in the first of its processes; the others follow it to its end.

    Raises:
        CorruptInputError: the program is not one of this model and recipe.
        RankLostError: not all processes came; in the others also, that one ended.
        SystemExit: in the others, when the work is done.
    """
    program, manifest = bundle.program, bundle.manifest
    assert isinstance(program, SteppedProgram)
    here = Placement.here()
    forms, sharing = Forms.of(manifest.recipe, expected_tensors(bundle.config)), program.sharing
    made = ModelPrograms.of(bundle.config, forms, sharing)
    if made.programs != program.programs:
        raise CorruptInputError(
            f"the program of {bundle.directory} is not what its model and recipe make with this version",
            "Build it again with this version.",
        )
    ranks = Ranks.join(torch.device("cpu")) if program.ranks > 1 else None
    stored = StoredWeights(bundle.directory, program.places(here.rank), program.experts, sharing, here.rank)
    runner = _runner(made, stored_share(stored, forms), ranks)
    if ranks and here.rank:
        follow(ranks, runner.obey)
    return ProgramSession(
        bundle.config,
        runner,
        manifest.max_tokens,
        min(manifest.engine.prefill_chunk, manifest.max_tokens),
        manifest.engine.max_sequences,
    )


def _runner(made: ModelPrograms, share: Share, ranks: Ranks | None) -> RankRunner:
    weights = ProgramWeights(share, made.forms)
    segments = TorchSegments(made.segments, weights)
    executor = TorchExecutor(segments, weights, ranks.exchange if ranks else refuse)
    return RankRunner(executor, made.programs, ranks)
