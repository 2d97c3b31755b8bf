"""Weights for benchmarks on a device: a checkpoint's, or random codes made there, and what they decode to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from step35_trt.checkpoint import EXPERT_PROJECTIONS
from step35_trt.dialects.torch_experts import Experts, checkpoint_experts
from step35_trt.kernels import plugin
from step35_trt.runtime.programs.program_weights import DTYPES, decoded, tensor
from step35_trt.weight_forms import ROUTER, packed_weight

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from step35_trt.checkpoint import Checkpoint
    from step35_trt.program import ExpertFormat
    from step35_trt.runtime.device.device_weights import Stored, WeightSource
    from step35_trt.weight_forms import Forms

CODE_SPREAD = {"int4": 4.61, "float8_e4m3fn": 1.0, "int8": 73.9}  # standard deviations of the codes made here


@dataclass(frozen=True)
class CheckpointSource:
    """`WeightSource` of a checkpoint whose experts are in the forms' own coding."""

    checkpoint: Checkpoint
    forms: Forms
    device: torch.device

    def dense(self, name: str) -> Stored:
        """See `WeightSource`."""
        packed = packed_weight(self.checkpoint, name, self.forms(name))
        scales = None if packed.scales is None else tensor(packed.scales).to(self.device)
        return tensor(packed.values).to(self.device), scales

    def experts(self, prefix: str) -> Experts:
        """See `WeightSource`."""
        return checkpoint_experts(self.checkpoint, prefix, self.device)


@dataclass(frozen=True)
class RandomSource:
    """`WeightSource` of random codes: activations keep their size from layer to layer, choices are even.

    Attributes:
        forms: Of the weights.
        formats: The kernels' format of each layer's experts, by prefix.
        device: Where they are made; nothing comes from the host.
        seed: What is made for a name depends on the name and this alone.
    """

    forms: Forms
    formats: Mapping[str, ExpertFormat]
    device: torch.device
    seed: int = 0

    def dense(self, name: str) -> Stored:
        """See `WeightSource`."""
        form, generator = self.forms(name), self._generator(name)
        if len(form.shape) == 1:  # norms count from one, and a router's bias prefers no expert
            return torch.zeros(form.shape, dtype=torch.float32, device=self.device), None
        if form.scale_dtype is None:
            gain = 1.0 if name.endswith("embed_tokens.weight") else 1 / math.sqrt(form.shape[1])
            plain = torch.randn(form.shape, generator=generator, device=self.device) * gain
            return plain.to(torch.float32 if name.endswith(ROUTER) else DTYPES[self.forms.activation]), None
        shape = form.shape
        if form.dtype == "int4":
            shape = shape[0], shape[1] // 2
        factor = 1 / (math.sqrt(form.shape[1]) * CODE_SPREAD[form.dtype])
        scales = torch.full(form.scale_shape, factor, dtype=DTYPES[form.scale_dtype], device=self.device)
        return self._codes(form.dtype, shape, generator), scales

    def experts(self, prefix: str) -> Experts:
        """See `WeightSource`."""
        kind = self.formats[prefix]
        module, packing = plugin.load("sparse_moe", "weights"), plugin.load("sparse_moe", "pack")
        matrices = []
        for part in EXPERT_PROJECTIONS:
            name = f"{prefix}.{part}.weight"
            (count, n, k), generator = self.forms.shapes[name], self._generator(name)
            value_shape, scale_shape = packing.shapes(kind, n, k)
            factor = 1 / math.sqrt(k)
            if kind == "bf16":
                made = torch.empty(count, n, k, dtype=torch.bfloat16, device=self.device)
                matrices.append(module.Matrix(made.normal_(0, factor, generator=generator), None))
                continue
            dtype = "int4" if kind == "int4" else "float8_e4m3fn"
            values = self._codes(dtype, (count, *value_shape), generator, words=kind == "int4")
            factor /= CODE_SPREAD[dtype]
            if kind == "int4":
                pair = torch.full((2,), factor, dtype=torch.float16).view(torch.int32).item()
                scales = torch.full((count, *scale_shape), pair, dtype=torch.int32, device=self.device)
            else:
                scales = torch.full((count, *scale_shape), factor, device=self.device)
            matrices.append(module.Matrix(values, scales))
        return Experts(kind, module.ExpertWeights(*matrices))

    def _codes(
        self, dtype: str, shape: tuple[int, ...], generator: torch.Generator, *, words: bool = False
    ) -> Tensor:
        if words:
            made = torch.empty(shape, dtype=torch.int16, device=self.device)
            return made.random_(-(1 << 15), 1 << 15, generator=generator)
        if dtype == "float8_e4m3fn":
            wide = torch.randn(shape, generator=generator, device=self.device)
            return wide.to(torch.float8_e4m3fn)
        kind = torch.uint8 if dtype == "int4" else torch.int8
        least, most = (0, 256) if dtype == "int4" else (-128, 128)
        made = torch.empty(shape, dtype=torch.int16, device=self.device)
        return made.random_(least, most, generator=generator).to(kind)

    def _generator(self, name: str) -> torch.Generator:
        known = sorted(self.forms.shapes)
        return torch.Generator(self.device).manual_seed(self.seed + known.index(name))


@dataclass(frozen=True)
class DecodedWeights:
    """`dialects.torch.Weights` of the very codes that a source gives, decoded in fp32 and rounded to `dtype`.

    In fp32 they are what an oracle computes with. Vectors and routers stay fp32.
    """

    source: WeightSource
    forms: Forms
    dtype: torch.dtype
    _dense: dict[str, Tensor] = field(default_factory=dict)
    _stacks: dict[str, Experts] = field(default_factory=dict)

    def tensor(self, name: str) -> Tensor:
        """See `Weights`."""
        if name not in self._dense:
            form = self.forms(name)
            value = decoded(*self.source.dense(name), form, torch.float32).float()
            fp32 = len(form.shape) == 1 or name.endswith(ROUTER)
            self._dense[name] = value if fp32 else value.to(self.dtype)
        return self._dense[name]

    def expert(self, name: str, index: int) -> Tensor:
        """See `Weights`."""
        prefix, part, _ = name.rsplit(".", 2)
        if prefix not in self._stacks:
            self._stacks[prefix] = self.source.experts(prefix)
        stacks = self._stacks[prefix]
        result: Tensor = getattr(stacks.weights, part.removesuffix("_proj")).expert(stacks.format, index)
        return result.to(self.dtype)
