"""A checkpoint's parameters as the torch dialect takes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from step35_trt.checkpoint import Checkpoint
    from step35_trt.dialects.torch_experts import Experts


@dataclass
class CheckpointWeights:
    """Parameters of a checkpoint in `dtype`; vectors and the router stay fp32.

    Dense tensors are kept once read. Experts are read when chosen and kept as well, so memory grows with the
    experts in use: meant for small models and slices.
    """

    checkpoint: Checkpoint
    dtype: torch.dtype = torch.float32
    _kept: dict[tuple[str, int | None], Tensor] = field(default_factory=dict)

    def tensor(self, name: str) -> Tensor:
        """See `torch.Weights`."""
        return self._read(name, None)

    def expert(self, name: str, index: int) -> Tensor:
        """See `torch.Weights`."""
        return self._read(name, index)

    def experts(self, prefix: str) -> Experts:
        """See `torch_kernels.ExpertSource`."""
        from step35_trt.dialects.torch_experts import checkpoint_experts

        return checkpoint_experts(self.checkpoint, prefix, "cpu")

    def _read(self, name: str, index: int | None) -> Tensor:
        if (name, index) not in self._kept:
            value = torch.from_numpy(self.checkpoint.read(name, index))
            fp32 = value.ndim == 1 or name.endswith(".moe.gate.weight")
            self._kept[name, index] = value if fp32 else value.to(self.dtype)
        return self._kept[name, index]
