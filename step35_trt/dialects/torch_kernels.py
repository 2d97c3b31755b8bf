"""The torch dialect's plugins as Triton kernels: on a CUDA device, or in Triton's interpreter on the CPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from step35_trt.checkpoint import EXPERT_PROJECTIONS
from step35_trt.dialects.paged_rows import PagedRows, PagePool
from step35_trt.dialects.torch_experts import Experts
from step35_trt.errors import UnsupportedError
from step35_trt.kernels import plugin, tactics
from step35_trt.kernels.jit import JIT
from step35_trt.kernels.targets import gpu_target
from step35_trt.rotary import inverse_frequencies

if TYPE_CHECKING:
    from torch import Tensor

    from step35_trt.config import LayerSpec
    from step35_trt.dialects.torch import HeldWeights, SequenceBatch
    from step35_trt.kernels.launching import Launcher
    from step35_trt.kernels.targets import GpuTarget

# What one decoding step verifies at most.
QUERIES: int = plugin.load("gated_attention", "geometry").QUERIES


def present_target(device: torch.device) -> GpuTarget:
    """The target that a CUDA device is.

    Raises:
        UnsupportedError: there is no CUDA device, or there are no kernels for it.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        raise UnsupportedError("there is no CUDA device here", "Run this on a machine with an NVIDIA GPU.")
    major, minor = torch.cuda.get_device_capability(device)
    return gpu_target(f"sm_{major}{minor}")


@runtime_checkable
class ExpertSource(Protocol):
    """`Weights` that have experts in the kernels' own forms, not only as numbers."""

    def experts(self, prefix: str) -> Experts:
        """All experts of a layer that there are here, `prefix` such as `model.layers.3.moe`."""
        ...


@dataclass(frozen=True)
class TritonKernels:
    """`Kernels` with the tactics of `target`.

    Attributes:
        weights: Where experts are found; where they have no form for kernels, they become bf16.
        target: Whose tactics are taken; the tensors' device decides where kernels run.
        kv_dtype: What keys and values are kept in: the activations' type, or e4m3 with scales of 1, which a
            normed key and a value of a trained model do not exceed.
        launcher: Carries launches out.
    """

    weights: HeldWeights
    target: GpuTarget
    kv_dtype: torch.dtype | None = None
    launcher: Launcher = JIT
    _experts: dict[str, Experts] = field(default_factory=dict)
    _pools: dict[tuple[int, torch.dtype], PagePool] = field(default_factory=dict)

    def gated_attention(
        self,
        batch: SequenceBatch,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor,
        q_gamma: Tensor,
        k_gamma: Tensor,
        eps: float,
        layer: LayerSpec,
    ) -> Tensor:
        """See `Kernels`: one launch for all sequences, over pages that they share out among themselves.

        A cache is a `PagedRows`; where nothing is to be kept, pages are taken for this call.
        """
        attention, module = (plugin.load("gated_attention", name) for name in ("launch", "geometry"))
        pool = self._pool(layer, module.PAGE, self.kv_dtype or q.dtype, q.device)
        sequences = [_rows(pool, caches, layer.index) for caches in batch.caches]
        for rows, past, length in zip(sequences, batch.pasts, batch.lengths, strict=True):
            rows.reserve(past, length)
        result: Tensor = attention.gated_attention(
            q,
            k,
            v,
            gate,
            q_gamma,
            k_gamma,
            frequencies(layer, q.device),
            pool.cache(sequences),
            _described(batch.lengths, batch.pasts, q.device),
            module.Geometry.of(layer, eps, QUERIES),
            tactics.load("gated_attention", self.target.capability).entries,
            self.launcher,
        )
        return result

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
        """See `Kernels`. Activations are multiplied in bf16, whatever their type."""
        launch, geometry = plugin.load("sparse_moe", "launch"), plugin.load("sparse_moe", "geometry")
        if experts not in self._experts:
            self._experts[experts] = self._found(experts)
        stacks = self._experts[experts]
        here, inner = stacks.weights.gate.values.shape[:2]
        widths = x.shape[-1], inner
        described = geometry.Geometry(selection.shape[1], top_k, *widths, scale, stacks.format, held=here)
        entries = tactics.load("sparse_moe", self.target.capability).entries
        ids, mix = launch.route_selection(
            selection, weights, described, entries, self.launcher, first=stacks.first
        )
        narrow = x.to(torch.bfloat16)
        given = narrow, ids, mix, stacks.weights, described, entries, limit
        result: Tensor = launch.experts(*given, out=torch.empty_like(x), launcher=self.launcher)
        return result

    def _found(self, prefix: str) -> Experts:
        if isinstance(self.weights, ExpertSource):
            return self.weights.experts(prefix)
        module = plugin.load("sparse_moe", "weights")
        stacks = (self.weights.tensor(f"{prefix}.{name}.weight") for name in EXPERT_PROJECTIONS)
        matrices = (module.Matrix(stack.to(torch.bfloat16).contiguous(), None) for stack in stacks)
        return Experts("bf16", module.ExpertWeights(*matrices))

    def _pool(self, layer: LayerSpec, page: int, dtype: torch.dtype, device: torch.device) -> PagePool:
        key = layer.index, dtype
        if key not in self._pools:
            shape = layer.kv_heads, page, layer.head_dim
            self._pools[key] = PagePool.of(shape, dtype, device, layer.window)
        return self._pools[key]


def _rows(pool: PagePool, caches: dict[int, Any] | None, layer: int) -> PagedRows:
    """A sequence's rows in a layer."""
    if caches is None:
        return pool.open()
    if layer not in caches:
        caches[layer] = pool.open()
    kept = caches[layer]
    assert isinstance(kept, PagedRows)
    return kept


@functools.lru_cache(maxsize=8)
def _described(lengths: tuple[int, ...], pasts: tuple[int, ...], device: torch.device) -> Any:
    """What all layers of a step share."""
    return plugin.load("gated_attention", "batch").Batch.of(lengths, pasts, device)


@functools.lru_cache(maxsize=256)
def frequencies(layer: LayerSpec, device: torch.device) -> Tensor:
    """A layer's inverse frequencies, fp32, on a device; made once."""
    return torch.from_numpy(inverse_frequencies(layer)).to(device)
