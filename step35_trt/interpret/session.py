"""The session protocol over programs of segments, run by the interpreter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from step35_trt.dialects.tensorrt_segment import Builder
from step35_trt.dialects.torch import LayerCache, SequenceBatch
from step35_trt.interpret.executor import Executor, refuse
from step35_trt.interpret.weights import FormedWeights
from step35_trt.lower import ModelPrograms
from step35_trt.runtime.session import Step
from step35_trt.sharing import ALONE
from step35_trt.weight_forms import NUMPY

if TYPE_CHECKING:
    from step35_trt.checkpoint import Checkpoint
    from step35_trt.config import Step35Config
    from step35_trt.interpret.executor import Exchange
    from step35_trt.runtime.session import Floats, Ids
    from step35_trt.sharing import Sharing
    from step35_trt.steps import StepProgram
    from step35_trt.weight_forms import Forms


@dataclass(frozen=True)
class InterpretedSession:
    """`Session` over a decoder's and its MTP modules' programs."""

    config: Step35Config
    executor: Executor
    decoder: StepProgram
    mtp: tuple[StepProgram, ...]
    prefill_chunk: int = 512

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        forms: Forms,
        sharing: Sharing = ALONE,
        rank: int = 0,
        exchange: Exchange = refuse,
    ) -> InterpretedSession:
        """Programs and networks of a checkpoint, or of a rank's share of it; nothing is compiled.

        Raises:
            UnsupportedError: TensorRT-RTX is not installed, or the model does not fit its types.
        """
        made, builder = ModelPrograms.of(checkpoint.config, forms, sharing), Builder.rtx()
        networks = {key: builder.write(segment, made.forms) for key, segment in made.segments.items()}
        executor = Executor(networks, FormedWeights.of(checkpoint, forms, sharing, rank), exchange)
        return cls(checkpoint.config, executor, made.decoder, made.mtp)

    @property
    def max_tokens(self) -> int:
        """See `Session`."""
        return self.config.max_position_embeddings

    def open(self) -> InterpretedSequence:
        """See `Session`."""
        return InterpretedSequence(self)


@dataclass
class InterpretedSequence:
    """`Sequence` with the definition's caches, which forget nothing."""

    session: InterpretedSession
    length: int = 0
    _drafts: dict[int, int] = field(default_factory=dict)
    _caches: dict[int, LayerCache] = field(default_factory=dict)

    def decode(self, token_ids: Ids, rows: Ids) -> Step:
        """See `Sequence`."""
        inputs = {"token_ids": token_ids, "rows": rows}
        step = self._run(self.session.decoder, inputs, self.length)
        self.length += len(token_ids)
        return step

    def truncate(self, length: int) -> None:
        """See `Sequence`."""
        for layer in self.session.config.layers:
            self._caches[layer.index].truncate(length)
        self.length = length

    def draft_length(self, module: int) -> int:
        """See `Sequence`."""
        return self._drafts.get(module, 0)

    def draft(self, module: int, token_ids: Ids, hidden: Floats, rows: Ids) -> Step:
        """See `Sequence`."""
        program, past = self.session.mtp[module], self.draft_length(module)
        carried = hidden.astype(NUMPY[program.activation])
        step = self._run(program, {"token_ids": token_ids, "rows": rows, "carried": carried}, past)
        self._drafts[module] = past + len(token_ids)
        return step

    def truncate_draft(self, module: int, length: int) -> None:
        """See `Sequence`."""
        self._caches[self.session.config.mtp_layers[module].index].truncate(length)
        self._drafts[module] = length

    def _run(self, program: StepProgram, inputs: dict[str, np.ndarray], past: int) -> Step:
        batch = SequenceBatch((len(inputs["token_ids"]),), (past,), (self._caches,))
        out = self.session.executor.run(program, inputs, batch)
        return Step(out["logits"].astype(np.float32), out["hidden"].astype(np.float32))
