"""A model as it comes back from its codes: weights, and activations where products round them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from step35_trt.quantize.calibration.observe import WatchingOps
from step35_trt.quantize.calibration.quantisers import fake_quantise, quantise_activations

if TYPE_CHECKING:
    from torch import Tensor

    from step35_trt.quantize.calibration.setup import CodingOf
    from step35_trt.quantize.folding import Folding, TensorSource


@dataclass(frozen=True)
class QuantisedWeights:
    """`Weights` that quantises what it reads and keeps nothing.

    Attributes:
        source: What is quantised, folded already.
        folding: For the clips.
        coding: How each parameter is stored.
        device: Where products are computed.
    """

    source: TensorSource
    folding: Folding
    coding: CodingOf
    device: torch.device

    def tensor(self, name: str) -> Tensor:
        """See `Weights`."""
        return self._quantised(name, None)

    def expert(self, name: str, index: int) -> Tensor:
        """See `Weights`; also one row of a matrix."""
        return self._quantised(name, index)

    def _quantised(self, name: str, index: int | None) -> Tensor:
        value = torch.from_numpy(self.source.read(name, index)).to(self.device)
        shape = self.source.shape(name)
        if len(shape) == 1:
            return value
        scaling = self.folding.scalings.get(name)
        clip = None
        if scaling is not None and scaling.clip is not None:
            clip = torch.from_numpy(scaling.clip if index is None else scaling.clip[index]).to(self.device)
        if value.ndim == 1:  # a row
            row = fake_quantise(value[None], self.coding(name, shape), None if clip is None else clip[None])
            return row[0]
        return fake_quantise(value, self.coding(name, shape), clip)


@dataclass(frozen=True)
class QuantisedOps(WatchingOps):
    """The torch dialect over quantised weights; `fp8` rounds the inputs of products with FP8 weights."""

    fp8: bool = False

    def linear(self, x: Tensor, weight: str) -> Tensor:
        """See `Ops`."""
        return super().linear(self.rounded(x, weight), weight)

    def rounded(self, x: Tensor, weight: str) -> Tensor:
        """The input of a product as the product sees it."""
        assert isinstance(self.weights, QuantisedWeights)
        source = self.weights.source
        kind = self.weights.coding(weight, source.shape(weight)).kind
        return quantise_activations(x) if self.fp8 and kind in ("fp8-rows", "fp8-blocks") else x
