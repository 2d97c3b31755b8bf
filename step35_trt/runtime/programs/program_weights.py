"""What a rank holds of the weights, in torch: stored as programs take them, decoded where they are used."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from step35_trt.weight_forms import Packed, packed_weight

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from step35_trt.checkpoint import Checkpoint
    from step35_trt.gpu_weights import StoredWeights
    from step35_trt.sharing import Sharing
    from step35_trt.steps import WeightBinding
    from step35_trt.weight_forms import Forms, WeightForm

# Gives a rank's share of a weight, or of one expert's matrix; None where another rank holds the expert.
Share = Callable[[str, int | None], Packed | None]

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class ProgramWeights:
    """`dialects.torch.HeldWeights`.

    What is not quantised is given as it lies, a mapped file's pages themselves; the rest is decoded at each
    use, in fp32 and then rounded once to the type that is computed in, so memory holds the codes alone.

    Attributes:
        share: Where values and scales come from; asked once for each.
        forms: Of the rank's share.
        device: Where they are kept.
    """

    share: Share
    forms: Forms
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _kept: dict[tuple[str, int | None], tuple[Tensor, Tensor | None] | None] = field(default_factory=dict)

    @property
    def activation(self) -> torch.dtype:
        """What dense algebra is computed in."""
        return DTYPES[self.forms.activation]

    def tensor(self, name: str) -> Tensor:
        """See `HeldWeights`."""
        stored = self._stored(name, None)
        assert stored is not None
        return decoded(*stored, self.forms(name), self.activation)

    def expert(self, name: str, index: int) -> Tensor | None:
        """See `HeldWeights`."""
        stored = self._stored(name, index)
        return None if stored is None else decoded(*stored, self.forms(name), self.activation)

    def vector(self, binding: WeightBinding) -> Tensor:
        """A vector in fp32, what is added to it included."""
        return self.tensor(binding.weight).float() + binding.plus

    def embedding(self, token_ids: Tensor, name: str) -> Tensor:
        """`Ops.embedding`: of a coded table only the rows that are asked for are decoded."""
        stored = self._stored(name, None)
        assert stored is not None
        values, scales = stored
        if scales is None:
            return functional.embedding(token_ids, values)
        form = self.forms(name)
        some = replace(form, shape=(len(token_ids), form.shape[1]))
        return decoded(values[token_ids], scales[token_ids], some, self.activation)

    def _stored(self, name: str, expert: int | None) -> tuple[Tensor, Tensor | None] | None:
        if (name, expert) not in self._kept:
            packed = self.share(name, expert)
            self._kept[name, expert] = None if packed is None else self._placed(packed)
        return self._kept[name, expert]

    def _placed(self, packed: Packed) -> tuple[Tensor, Tensor | None]:
        scales = None if packed.scales is None else tensor(packed.scales).to(self.device)
        return tensor(packed.values).to(self.device), scales


def checkpoint_share(checkpoint: Checkpoint, forms: Forms, sharing: Sharing, rank: int) -> Share:
    """A rank's share of a checkpoint, cut when it is read.

    Args:
        checkpoint: Where the whole weights are.
        forms: Of the whole weights.
        sharing: Who holds what.
        rank: From 0.
    """

    def share(name: str, expert: int | None) -> Packed | None:
        if expert is not None and not sharing.holds(name, expert, forms.shapes[name][0], rank):
            return None
        form = forms(name)
        return sharing.cut(packed_weight(checkpoint, name, form, expert), name, rank)

    return share


def stored_share(stored: StoredWeights, forms: Forms) -> Share:
    """A rank's share as its bundle has it: pages of its files.

    Args:
        stored: The rank's.
        forms: Of the whole weights.
    """

    def share(name: str, expert: int | None) -> Packed | None:
        if expert is not None and not stored.sharing.holds(name, expert, forms.shapes[name][0], stored.rank):
            return None
        return stored.read(name, forms(name), expert)

    return share


def tensor(values: NDArray[np.generic]) -> Tensor:
    """The same memory, of which nothing is written; torch has its own names for the short floating types."""
    if not values.flags.writeable:
        with warnings.catch_warnings():
            # A mapped file: torch knows no read-only tensors, and says so.
            warnings.simplefilter("ignore", UserWarning)
            return _tensor(values)
    return _tensor(values)


def _tensor(values: NDArray[np.generic]) -> Tensor:
    for name, carrier in (("bfloat16", np.int16), ("float8_e4m3fn", np.uint8)):
        if values.dtype.name == name:
            return torch.from_numpy(values.view(carrier)).view(getattr(torch, name))
    return torch.from_numpy(values)


def decoded(values: Tensor, scales: Tensor | None, form: WeightForm, activation: torch.dtype) -> Tensor:
    """A matrix as it is multiplied by: `values * scales` in fp32, rounded to `activation`.

    Args:
        values: As `form` says; int4 uint8 `[N, K / 2]`.
        scales: As `form` says.
        form: Of both.
        activation: Of the result; what has no scales keeps its type.
    """
    if scales is None:
        return values
    if form.dtype == "int4":
        values = torch.stack([(values & 15 ^ 8).to(torch.int8) - 8, values.view(torch.int8) >> 4], -1)
    (rows, columns), (n, k) = form.block, form.shape
    grid = scales.float().reshape(-(-n // rows), -1)
    spread = grid.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]
    return (values.reshape(n, k).float() * spread).to(activation)
