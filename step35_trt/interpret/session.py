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
from step35_trt.runtime.packing import UNBOUNDED, Packed, check_context
from step35_trt.runtime.session import Call
from step35_trt.sharing import ALONE
from step35_trt.weight_forms import NUMPY

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from step35_trt.checkpoint import Checkpoint
    from step35_trt.config import Step35Config
    from step35_trt.interpret.executor import Exchange
    from step35_trt.runtime.session import Capacity, Floats, Ids, Step
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

    @property
    def capacity(self) -> Capacity:
        """See `Session`."""
        return UNBOUNDED

    def open(self, prompt_ids: Ids | None = None, modules: int | None = None) -> InterpretedSequence:
        """See `Session`; nothing is kept of earlier sequences."""
        return InterpretedSequence(self)

    def decode(self, calls: SequenceOf[Call]) -> list[Step]:
        """See `Session`."""
        sequences = [_own(call) for call in calls]
        steps = self._run(self.decoder, calls, [sequence.length for sequence in sequences])
        for sequence, call in zip(sequences, calls, strict=True):
            sequence.length += len(call.token_ids)
        return steps

    def draft(self, module: int, calls: SequenceOf[Call]) -> list[Step]:
        """See `Session`."""
        sequences = [_own(call) for call in calls]
        lengths = [sequence.draft_length(module) for sequence in sequences]
        steps = self._run(self.mtp[module], calls, lengths)
        for sequence, length, call in zip(sequences, lengths, calls, strict=True):
            sequence.drafts[module] = length + len(call.token_ids)
        return steps

    def _run(self, program: StepProgram, calls: SequenceOf[Call], pasts: list[int]) -> list[Step]:
        check_context(calls, pasts, self.max_tokens)
        packed = Packed.of(calls)
        inputs: dict[str, np.ndarray] = {"token_ids": packed.token_ids, "rows": packed.rows}
        if packed.hidden is not None:
            inputs["carried"] = packed.hidden.astype(NUMPY[program.activation])
        caches = tuple(_own(call).caches for call in calls)
        out = self.executor.run(program, inputs, SequenceBatch(packed.lengths, tuple(pasts), caches))
        return packed.split(out["logits"].astype(np.float32), out["hidden"].astype(np.float32))


@dataclass
class InterpretedSequence:
    """`Sequence` with the definition's caches, which forget nothing: rows by layer, lengths by module."""

    session: InterpretedSession
    length: int = 0
    drafts: dict[int, int] = field(default_factory=dict)
    caches: dict[int, LayerCache] = field(default_factory=dict)

    def decode(self, token_ids: Ids, rows: Ids) -> Step:
        """See `Sequence`."""
        return self.session.decode([Call(self, token_ids, rows)])[0]

    def truncate(self, length: int) -> None:
        """See `Sequence`."""
        for layer in self.session.config.layers:
            self.caches[layer.index].truncate(length)
        self.length = length

    def draft_length(self, module: int) -> int:
        """See `Sequence`."""
        return self.drafts.get(module, 0)

    def draft(self, module: int, token_ids: Ids, hidden: Floats, rows: Ids) -> Step:
        """See `Sequence`."""
        return self.session.draft(module, [Call(self, token_ids, rows, hidden)])[0]

    def truncate_draft(self, module: int, length: int) -> None:
        """See `Sequence`."""
        self.caches[self.session.config.mtp_layers[module].index].truncate(length)
        self.drafts[module] = length

    def close(self) -> None:
        """See `Sequence`."""
        self.caches.clear()


def _own(call: Call) -> InterpretedSequence:
    assert isinstance(call.sequence, InterpretedSequence)
    return call.sequence
