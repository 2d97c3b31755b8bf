"""The torch session: the oracle behind the session protocol, straight from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from step35_trt import model
from step35_trt.dialects.checkpoint_weights import CheckpointWeights
from step35_trt.dialects.torch import SequenceBatch, TorchOps
from step35_trt.runtime.packing import UNBOUNDED, Packed, check_context
from step35_trt.runtime.session import Call

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    import numpy as np

    from step35_trt.checkpoint import Checkpoint
    from step35_trt.config import Step35Config
    from step35_trt.dialects.torch import Kernels, Rows, Weights
    from step35_trt.runtime.session import Capacity, Floats, Ids, Step


@dataclass(frozen=True)
class TorchSession:
    """`Session` over any `Weights`; with `kernels`, the plugins run as them (see `TorchOps`)."""

    config: Step35Config
    weights: Weights
    prefill_chunk: int = 512
    kernels: Kernels | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> TorchSession:
        """The reference for a checkpoint."""
        return cls(checkpoint.config, CheckpointWeights(checkpoint, dtype))

    @property
    def max_tokens(self) -> int:
        """See `Session`."""
        return self.config.max_position_embeddings

    @property
    def capacity(self) -> Capacity:
        """See `Session`."""
        return UNBOUNDED

    def open(self, prompt_ids: Ids | None = None, modules: int | None = None) -> TorchSequence:
        """See `Session`; nothing is kept of earlier sequences."""
        return TorchSequence(self)

    def decode(self, calls: SequenceOf[Call]) -> list[Step]:
        """See `Session`."""
        sequences = [_own(call) for call in calls]
        packed, ops = self._packed(calls, [sequence.length for sequence in sequences])
        with torch.inference_mode():
            out = model.decoder(ops, self.config, self._tensor(packed.token_ids), self._tensor(packed.rows))
        for sequence, length in zip(sequences, packed.lengths, strict=True):
            sequence.length += length
        return packed.split(*map(_array, out))

    def draft(self, module: int, calls: SequenceOf[Call]) -> list[Step]:
        """See `Session`."""
        sequences = [_own(call) for call in calls]
        packed, ops = self._packed(calls, [sequence.draft_length(module) for sequence in sequences])
        assert packed.hidden is not None
        with torch.inference_mode():
            carried = torch.from_numpy(packed.hidden).to(self._embedding)
            ids, rows = self._tensor(packed.token_ids), self._tensor(packed.rows)
            out = model.mtp_module(ops, self.config, module, ids, carried, rows)
        for sequence, length in zip(sequences, packed.lengths, strict=True):
            sequence.drafts[module] = sequence.draft_length(module) + length
        return packed.split(*map(_array, out))

    def _packed(self, calls: SequenceOf[Call], pasts: list[int]) -> tuple[Packed, TorchOps]:
        check_context(calls, pasts, self.max_tokens)
        packed = Packed.of(calls)
        caches = tuple(_own(call).caches for call in calls)
        batch = SequenceBatch(packed.lengths, tuple(pasts), caches)
        return packed, TorchOps(self.weights, batch, self.kernels)

    @property
    def _embedding(self) -> torch.Tensor:
        return self.weights.tensor("model.embed_tokens.weight")

    def _tensor(self, numbers: Ids) -> torch.Tensor:
        return torch.from_numpy(numbers).to(self._embedding.device)


@dataclass
class TorchSequence:
    """`Sequence` with caches that forget nothing: a layer's rows by its index, a module's length by its."""

    session: TorchSession
    length: int = 0
    drafts: dict[int, int] = field(default_factory=dict)
    caches: dict[int, Rows] = field(default_factory=dict)

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


def _own(call: Call) -> TorchSequence:
    assert isinstance(call.sequence, TorchSequence)
    return call.sequence


def _array(values: torch.Tensor) -> np.ndarray:
    return values.float().cpu().numpy()
