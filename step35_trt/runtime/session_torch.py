"""The torch session: the oracle behind the session protocol, straight from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from step35_trt import model
from step35_trt.dialects.torch import CheckpointWeights, SequenceBatch, TorchOps
from step35_trt.runtime.session import Step

if TYPE_CHECKING:
    from step35_trt.checkpoint import Checkpoint
    from step35_trt.config import Step35Config
    from step35_trt.dialects.torch import Kernels, Rows, Weights
    from step35_trt.runtime.session import Floats, Ids


@dataclass(frozen=True)
class TorchSession:
    """`Session` over any `Weights`; with `kernels`, the plugins run as them (see `TorchOps`)."""

    config: Step35Config
    weights: Weights
    prefill_chunk: int = 512
    kernels: Kernels | None = None

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> TorchSession:
        """The reference for a checkpoint; on a CUDA device with the GPU kernels.

        Raises:
            UnsupportedError: there are no kernels for the device.
        """
        weights = CheckpointWeights(checkpoint, dtype, device)
        if device == "cpu":
            return cls(checkpoint.config, weights)
        from step35_trt.dialects.torch_kernels import TritonKernels, present_target

        kernels = TritonKernels(weights, present_target(torch.device(device)))
        return cls(checkpoint.config, weights, kernels=kernels)

    @property
    def max_tokens(self) -> int:
        """See `Session`."""
        return self.config.max_position_embeddings

    def open(self) -> TorchSequence:
        """See `Session`."""
        return TorchSequence(self)


@dataclass
class TorchSequence:
    """`Sequence` with caches that forget nothing."""

    session: TorchSession
    length: int = 0
    _drafts: dict[int, int] = field(default_factory=dict)
    _caches: dict[int, Rows] = field(default_factory=dict)

    def decode(self, token_ids: Ids, rows: Ids) -> Step:
        """See `Sequence`."""
        ops = self._ops(len(token_ids), self.length)
        with torch.inference_mode():
            logits, hidden = model.decoder(
                ops, self.session.config, self._tensor(token_ids), self._tensor(rows)
            )
        self.length += len(token_ids)
        return _step(logits, hidden)

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
        config = self.session.config
        ops = self._ops(len(token_ids), self.draft_length(module))
        with torch.inference_mode():
            embedding = self.session.weights.tensor("model.embed_tokens.weight")
            carried = torch.from_numpy(hidden).to(embedding)
            logits, out = model.mtp_module(
                ops, config, module, self._tensor(token_ids), carried, self._tensor(rows)
            )
        self._drafts[module] = self.draft_length(module) + len(token_ids)
        return _step(logits, out)

    def truncate_draft(self, module: int, length: int) -> None:
        """See `Sequence`."""
        self._caches[self.session.config.mtp_layers[module].index].truncate(length)
        self._drafts[module] = length

    def _ops(self, tokens: int, past: int) -> TorchOps:
        batch = SequenceBatch((tokens,), (past,), (self._caches,))
        return TorchOps(self.session.weights, batch, self.session.kernels)

    def _tensor(self, numbers: Ids) -> torch.Tensor:
        return torch.from_numpy(numbers).to(self.session.weights.tensor("model.embed_tokens.weight").device)


def _step(logits: torch.Tensor, hidden: torch.Tensor) -> Step:
    return Step(logits.float().cpu().numpy(), hidden.float().cpu().numpy())
