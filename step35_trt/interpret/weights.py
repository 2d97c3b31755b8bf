"""A checkpoint's weights in the forms of a program: packed for its engines, decoded for the definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from step35_trt.interpret.kept import Kept
from step35_trt.sharing import ALONE, Sharing
from step35_trt.weight_forms import NUMPY, Forms, Packed, WeightForm, of_rows, packed_weight, unpack

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from step35_trt.checkpoint import Checkpoint
    from step35_trt.steps import WeightBinding

KEPT_BYTES = 256 << 20  # of packed and of decoded weights: a layer at real width, all of a small model
PART = 16 << 20  # numbers decoded at a time

# Gives a weight in a form, or one expert's matrix of a stacked one.
Read = Callable[[str, WeightForm, int | None], Packed]


@dataclass(frozen=True)
class FormedWeights:
    """What a rank has of the weights; what was used lately is kept, so that memory stays bounded.

    `read` gives the rank's share of a weight, and is not asked for experts that it has not; `forms` are the
    whole model's. Of an expert that another rank holds, the decoded weight is zero, so that
    the definition adds up what this rank contributes.

    As `dialects.torch.Weights` it gives decoded weights, rounded to the type that is computed in: the
    definition then multiplies by exactly what the engines multiply by.
    """

    read: Read
    forms: Forms
    sharing: Sharing = ALONE
    rank: int = 0
    _packed: Kept[Packed] = field(default_factory=lambda: Kept(KEPT_BYTES, _bytes))
    _decoded: Kept[torch.Tensor] = field(default_factory=lambda: Kept(KEPT_BYTES, lambda t: t.nbytes))

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, forms: Forms, sharing: Sharing = ALONE, rank: int = 0
    ) -> FormedWeights:
        """A checkpoint's."""

        def read(name: str, form: WeightForm, expert: int | None) -> Packed:
            return sharing.cut(packed_weight(checkpoint, name, form, expert), name, rank)

        return cls(read, forms, sharing, rank)

    @cached_property
    def _own(self) -> Forms:
        """Of what this rank holds."""
        return self.sharing.share(self.forms)

    def tensor(self, name: str) -> torch.Tensor:
        """See `dialects.torch.Weights`."""
        return self._decode(name, None)

    def expert(self, name: str, index: int) -> torch.Tensor:
        """See `dialects.torch.Weights`."""
        return self._decode(name, index)

    def bound(self, binding: WeightBinding) -> NDArray[np.generic]:
        """What an engine's input is given."""
        packed = self.packed(binding.weight)
        if binding.part == "vector":
            return (packed.values.astype(np.float32) + np.float32(binding.plus))[None]
        if binding.part == "scales":
            assert packed.scales is not None
            return packed.scales
        return packed.values

    def packed(self, name: str, expert: int | None = None) -> Packed:
        """A weight as it is stored."""
        return self._packed.get((name, expert), lambda: self.read(name, self.forms(name), expert))

    def _decode(self, name: str, expert: int | None) -> torch.Tensor:
        def decoded() -> torch.Tensor:
            form = self._own(name)
            experts = self.forms.shapes[name][0]
            dtype = NUMPY["float32" if form.dtype == "float32" else self.forms.activation]
            if expert is None or self.sharing.holds(name, expert, experts, self.rank):
                return to_torch(_decoded(self.packed(name, expert), form, dtype), copy=False)
            return to_torch(np.zeros(form.shape, dtype), copy=False)

        return self._decoded.get((name, expert), decoded)


def _decoded(packed: Packed, form: WeightForm, dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
    """Some rows after the other: a whole head in fp32 would take gigabytes."""
    found = np.empty(form.shape, dtype)
    edge = max(1, form.block[0])
    step = max(1, PART // (found.size // len(found)) // edge) * edge
    for start in range(0, len(found), step):
        rows = slice(start, min(start + step, len(found)))
        blocks = slice(start // edge, math.ceil(rows.stop / edge))
        scales = None if packed.scales is None else packed.scales[blocks]
        found[rows] = unpack(Packed(packed.values[rows], scales), of_rows(form, rows)).astype(dtype)
    return found


def _bytes(packed: Packed) -> int:
    return packed.values.nbytes + (0 if packed.scales is None else packed.scales.nbytes)


def to_torch(values: NDArray[np.generic], *, copy: bool = True) -> torch.Tensor:
    """The same values; torch and numpy name bf16 differently. Without a copy they are the tensor's memory."""
    if values.dtype == NUMPY["bfloat16"]:
        return torch.from_numpy(np.array(values.view(np.int16), copy=copy)).view(torch.bfloat16)
    return torch.from_numpy(np.array(values, copy=copy))


def to_numpy(values: torch.Tensor) -> NDArray[np.generic]:
    """The inverse of `to_torch`."""
    if values.dtype == torch.bfloat16:
        return values.contiguous().view(torch.int16).numpy().view(NUMPY["bfloat16"])
    array: NDArray[np.generic] = values.contiguous().numpy()
    return array
