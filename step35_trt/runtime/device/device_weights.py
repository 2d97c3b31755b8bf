"""What a device holds of the weights, in the forms that its kernels or its engines multiply by.

Kernels have an order of codes of their own, and what they do not take is decoded once; engines take weights
as they are stored. Whoever asks first decides which of the two is kept.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn import functional

from step35_trt.gpu_forms import GROUP, kernel_format
from step35_trt.kernels import plugin
from step35_trt.kernels.jit import JIT
from step35_trt.runtime.programs.program_weights import DTYPES, decoded

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from step35_trt.dialects.torch_experts import Experts
    from step35_trt.kernels.launching import Launcher
    from step35_trt.program import ExpertFormat
    from step35_trt.steps import WeightBinding
    from step35_trt.weight_forms import Forms

Stored = tuple["Tensor", "Tensor | None"]


class WeightSource(Protocol):
    """Where weights come from, on the device."""

    def dense(self, name: str) -> Stored:
        """Values and scales of a matrix or vector, as its form says (`weight_forms`)."""
        ...

    def experts(self, prefix: str) -> Experts:
        """All experts of a layer that the rank holds, `prefix` such as `model.layers.3.moe`."""
        ...


@dataclass(frozen=True)
class DeviceWeights:
    """`torch_segments.SegmentWeights`, `segment_engines.BoundWeights` and `torch_kernels.ExpertSource`.

    Attributes:
        source: Asked once for each matrix.
        forms: Of what the rank holds.
        device: Where they are kept.
        compiled: Whether there are kernels that take codes; without, codes are decoded at each use.
        launcher: Launches them.
    """

    source: WeightSource
    forms: Forms
    device: torch.device
    compiled: bool
    launcher: Launcher = JIT
    _dense: dict[str, Stored] = field(default_factory=dict)
    _coded: dict[str, tuple[ExpertFormat, Any] | None] = field(default_factory=dict)
    _vectors: dict[tuple[str, float], Tensor] = field(default_factory=dict)
    _stacks: dict[str, Experts] = field(default_factory=dict)

    @property
    def activation(self) -> torch.dtype:
        """What dense algebra is computed in."""
        return DTYPES[self.forms.activation]

    @property
    def words(self) -> dict[str, Callable[..., Tensor]]:
        """Words of `Ops` that are better spelled here than by the definition."""
        if not self.compiled:
            return {"linear": self.linear}
        dense = plugin.load("dense", "launch")
        rows = {name: getattr(dense, name) for name in ("rms_norm", "swiglu")}
        launched = {name: functools.partial(row, launcher=self.launcher) for name, row in rows.items()}
        return {"linear": self.linear, **launched}

    def tensor(self, name: str) -> Tensor:
        """See `HeldWeights`."""
        return decoded(*self._stored(name), self.forms(name), self.activation)

    def expert(self, name: str, index: int) -> Tensor | None:
        """See `HeldWeights`: in the type that is computed in, decoded from what kernels take."""
        prefix, part, _ = name.rsplit(".", 2)
        stacks = self.experts(prefix)
        matrix, place = getattr(stacks.weights, part.removesuffix("_proj")), index - stacks.first
        if not 0 <= place < len(matrix.values):
            return None
        result: Tensor = matrix.expert(stacks.format, place)
        return result.to(self.activation)

    def experts(self, prefix: str) -> Experts:
        """See `ExpertSource`."""
        if prefix not in self._stacks:
            self._stacks[prefix] = self.source.experts(prefix)
        return self._stacks[prefix]

    def vector(self, binding: WeightBinding) -> Tensor:
        """A vector in fp32, what is added to it included, in the place of the one that is stored."""
        key = binding.weight, binding.plus
        if key not in self._vectors:
            self._vectors[key] = self.tensor(binding.weight).float() + binding.plus
            del self._dense[binding.weight]
        return self._vectors[key]

    def bound(self, binding: WeightBinding) -> Tensor:
        """See `segment_engines.BoundWeights`."""
        if binding.part == "vector":
            return self.vector(binding)
        values, scales = self._stored(binding.weight)
        if binding.part == "values":
            return values
        assert scales is not None
        return scales

    def embedding(self, token_ids: Tensor, name: str) -> Tensor:
        """`Ops.embedding`: of a coded table only the rows that are asked for are decoded."""
        values, scales = self._stored(name)
        if scales is None:
            return functional.embedding(token_ids, values)
        form = self.forms(name)
        some = replace(form, shape=(len(token_ids), form.shape[1]))
        return decoded(values[token_ids], scales[token_ids], some, self.activation)

    def linear(self, x: Tensor, name: str) -> Tensor:
        """`Ops.linear`."""
        if name not in self._coded:
            self._coded[name] = self._for_kernels(name)
        coded = self._coded[name]
        if coded is None:
            return functional.linear(x, self.tensor(name))
        kind, matrix = coded
        rows, columns = self.forms(name).shape
        dense = plugin.load("dense", "launch")
        result: Tensor = dense.linear(x, matrix, kind, (rows, columns), self.launcher)
        return result

    def load(self, names: list[str], prefixes: list[str]) -> None:
        """Bring all that is named to the device now, experts in the order of layers."""
        for prefix in prefixes:
            self.experts(prefix)
        vectors = {name for name, _ in self._vectors}
        for name in names:
            if name not in vectors:
                self._stored(name)

    def _stored(self, name: str) -> Stored:
        if name not in self._dense:
            self._dense[name] = self.source.dense(name)
        return self._dense[name]

    def _for_kernels(self, name: str) -> tuple[ExpertFormat, Any] | None:
        """A matrix in the kernels' layout, which takes the place of the one it came in."""
        form = self.forms(name)
        values, scales = self._stored(name)
        if scales is None or not self.compiled:
            return None
        kind = kernel_format(form)
        if kind is None:
            self._dense[name] = self.tensor(name), None
            return None
        module = plugin.load("sparse_moe", "weights")
        if kind == "int4":
            values, scales = kernel_int4(values, scales)
            del self._dense[name]  # codes are kept once
        return kind, module.Matrix(values[None], scales[None])


def kernel_int4(values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """`[N, K / 2]` uint8 in two's complement, two of a row a byte, to `sparse_moe.pack`'s words and pairs.

    Args:
        values: See above; K is a multiple of 128.
        scales: `[N, K / 128]`; they are rounded to fp16.
    """
    n, half = values.shape
    codes = torch.stack([values & 15, values >> 4], -1).view(n, half * 2 // GROUP, 4, 32) ^ 8
    shifts = torch.arange(0, 16, 4, dtype=torch.int32, device=values.device)[:, None]
    words = (codes.int() << shifts).sum(2, dtype=torch.int32).to(torch.int16).view(n, half // 2)
    pairs = torch.zeros(n, -(-scales.shape[1] // 2) * 2, dtype=torch.float16, device=values.device)
    pairs[:, : scales.shape[1]] = scales.to(torch.float16)
    return words, pairs.view(torch.int32).T.contiguous()
