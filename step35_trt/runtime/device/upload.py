"""Weights of a bundle to a device: mapped files, read into one pinned buffer while another is sent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from step35_trt.checkpoint import EXPERT_PROJECTIONS
from step35_trt.dialects.torch_experts import Experts
from step35_trt.kernels import plugin
from step35_trt.runtime.programs.program_weights import tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from step35_trt.gpu_weights import StoredWeights
    from step35_trt.runtime.device.device_weights import Stored

CHUNK = 64 << 20


@dataclass
class Uploader:
    """Copies to a CUDA device, or to the CPU, where a copy is a view of the file.

    The host reads the next chunk from the file while the device takes the one before; nothing but the two
    chunks is held twice, pages of the file being the system's to drop.
    """

    device: torch.device
    _chunks: list[Tensor] = field(default_factory=list)
    _sent: list[torch.cuda.Event] = field(default_factory=list)
    _stream: torch.cuda.Stream | None = None
    _turn: int = 0

    def __call__(self, values: NDArray[np.generic]) -> Tensor:
        """The array on the device; what is queued there afterwards finds it complete."""
        source = tensor(values)
        if self.device.type != "cuda":
            return source
        if self._stream is None:
            self._chunks = [torch.empty(CHUNK, dtype=torch.uint8).pin_memory() for _ in range(2)]
            self._sent = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        target = torch.empty(source.shape, dtype=source.dtype, device=self.device)
        theirs = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        ours = target.view(-1).view(torch.uint8)
        # The allocator may have given memory that queued work still uses.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for start in range(0, len(theirs), CHUNK):
                part = theirs[start : start + CHUNK]
                turn, self._turn = self._turn, 1 - self._turn
                self._sent[turn].synchronize()
                chunk = self._chunks[turn][: len(part)]
                chunk.numpy()[:] = part
                ours[start : start + len(part)].copy_(chunk, non_blocking=True)
                self._sent[turn].record()
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        return target


@dataclass(frozen=True)
class BundleSource:
    """`WeightSource` of a bundle's rank.

    Attributes:
        stored: Its weights.
        upload: Brings them.
    """

    stored: StoredWeights
    upload: Uploader

    def dense(self, name: str) -> Stored:
        """See `WeightSource`."""
        return self._pair(name)

    def experts(self, prefix: str) -> Experts:
        """See `WeightSource`."""
        module = plugin.load("sparse_moe", "weights")
        names = [f"{prefix}.{part}.weight" for part in EXPERT_PROJECTIONS]
        weights = module.ExpertWeights(*(module.Matrix(*self._pair(name)) for name in names))
        return Experts(self.stored.experts[prefix], weights, self.stored.first(names[0]))

    def _pair(self, name: str) -> Stored:
        scales = f"{name}.scales"
        found = self.upload(self.stored.mapped(scales)) if scales in self.stored.places else None
        return self.upload(self.stored.mapped(name)), found
