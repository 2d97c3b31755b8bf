"""A checkpoint as it is stored, through the torch dialect, with the activations its products round."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from step35_trt.dialects.torch import TorchOps
from step35_trt.quantize.calibration.observe import WatchingOps
from step35_trt.quantize.calibration.quantisers import quantise_activations

if TYPE_CHECKING:
    from torch import Tensor

    from step35_trt.checkpoint import Checkpoint


@dataclass(frozen=True)
class Rounding:
    """Which products round their inputs to FP8, one scale a token: those with FP8 weights, if any do."""

    checkpoint: Checkpoint
    fp8: bool

    def __call__(self, x: Tensor, weight: str) -> Tensor:
        """The input of a product as the product sees it."""
        rounds = self.fp8 and self.checkpoint.codings[weight].kind in ("fp8-rows", "fp8-blocks")
        return quantise_activations(x) if rounds else x


@dataclass(frozen=True)
class ReplayOps(WatchingOps):
    """The dialect that computes everything but the vocabulary heads; `rounding` is always given."""

    rounding: Rounding | None = None

    def linear(self, x: Tensor, weight: str) -> Tensor:
        """See `Ops`."""
        return super().linear(self._input(x, weight), weight)

    def sparse_moe(
        self,
        x: Tensor,
        selection: Tensor,
        weights: Tensor,
        experts: str,
        top_k: int,
        scale: float,
        limit: float,
    ) -> Tensor:
        """See `Ops`; each chosen expert is read once."""
        ops = _RoutedOps(self.weights, self.batch, rounding=self.rounding, down=f"{experts}.down_proj.weight")
        x = self._input(x, f"{experts}.gate_proj.weight")
        return ops.sparse_moe(x, selection, weights, experts, top_k, scale, limit)

    def _input(self, x: Tensor, weight: str) -> Tensor:
        assert self.rounding is not None
        return self.rounding(x, weight)


@dataclass(frozen=True)
class _RoutedOps(TorchOps):
    """Rounds what enters the experts' `down`."""

    rounding: Rounding | None = None
    down: str = field(default="")

    def swiglu(self, gate: Tensor, up: Tensor, limit: float) -> Tensor:
        """See `Ops`."""
        assert self.rounding is not None
        return self.rounding(super().swiglu(gate, up, limit), self.down)
