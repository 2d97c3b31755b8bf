"""A checkpoint's weights in the forms of a program: packed for its engines, decoded for the definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from step35_trt.sharing import ALONE, Sharing
from step35_trt.weight_forms import NUMPY, Forms, Packed, WeightForm, packed_weight, unpack

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from step35_trt.checkpoint import Checkpoint
    from step35_trt.steps import WeightBinding

# Gives a weight in a form, or one expert's matrix of a stacked one.
Read = Callable[[str, WeightForm, int | None], Packed]


@dataclass(frozen=True)
class FormedWeights:
    """What a rank has of the weights; what was read once is kept: for small models and slices.

    `forms` are the whole model's. Of an expert that another rank holds, the decoded weight is zero, so that
    the definition adds up what this rank contributes.

    As `dialects.torch.Weights` it gives decoded weights, rounded to the type that is computed in: the
    definition then multiplies by exactly what the engines multiply by.
    """

    read: Read
    forms: Forms
    sharing: Sharing = ALONE
    rank: int = 0
    _packed: dict[tuple[str, int | None], Packed] = field(default_factory=dict)
    _decoded: dict[tuple[str, int | None], torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, forms: Forms, sharing: Sharing = ALONE, rank: int = 0
    ) -> FormedWeights:
        """A checkpoint's."""
        return cls(partial(packed_weight, checkpoint), forms, sharing, rank)

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
        if (name, expert) not in self._packed:
            form = self.forms(name)
            whole = self.read(name, form, expert)
            self._packed[name, expert] = self.sharing.cut(whole, name, form, self.rank)
        return self._packed[name, expert]

    def _decode(self, name: str, expert: int | None) -> torch.Tensor:
        if (name, expert) not in self._decoded:
            form = self.sharing.share(self.forms)(name)
            wide = unpack(self.packed(name, expert), form)
            experts = self.forms.shapes[name][0]
            if expert is not None and not self.sharing.holds(name, expert, experts, self.rank):
                wide = np.zeros_like(wide)
            kept = "float32" if form.dtype == "float32" else self.forms.activation
            self._decoded[name, expert] = to_torch(wide.astype(NUMPY[kept]))
        return self._decoded[name, expert]


def to_torch(values: NDArray[np.generic]) -> torch.Tensor:
    """The same values; torch and numpy name bf16 differently."""
    if values.dtype == NUMPY["bfloat16"]:
        return torch.from_numpy(np.array(values.view(np.int16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(values))


def to_numpy(values: torch.Tensor) -> NDArray[np.generic]:
    """The inverse of `to_torch`."""
    if values.dtype == torch.bfloat16:
        return values.contiguous().view(torch.int16).numpy().view(NUMPY["bfloat16"])
    array: NDArray[np.generic] = values.contiguous().numpy()
    return array
