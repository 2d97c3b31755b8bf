"""The torch dialect's plugins as Triton kernels: on a CUDA device, or in Triton's interpreter on the CPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from step35_trt.errors import UnsupportedError
from step35_trt.kernels import plugin, tactics
from step35_trt.kernels.targets import gpu_target
from step35_trt.rotary import inverse_frequencies

if TYPE_CHECKING:
    from torch import Tensor

    from step35_trt.config import LayerSpec
    from step35_trt.dialects.torch import SequenceBatch, Weights
    from step35_trt.kernels.targets import GpuTarget

QUERIES = 4  # a token and three drafts: what one decoding step verifies at most
FIRST_PAGES = 4


def present_target(device: torch.device) -> GpuTarget:
    """The target that a CUDA device is.

    Raises:
        UnsupportedError: there is no CUDA device, or there are no kernels for it.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        raise UnsupportedError("there is no CUDA device here", "Run this on a machine with an NVIDIA GPU.")
    major, minor = torch.cuda.get_device_capability(device)
    return gpu_target(f"sm_{major}{minor}")


@dataclass
class PagedRows:
    """Keys and values of one layer and sequence in pages of their own, which double when they are full.

    Nothing is evicted, also where a layer has a window, so any length can be returned to (see `LayerCache`).
    """

    cache: Any  # gated_attention.batch.PagedCache

    def truncate(self, length: int) -> None:
        """Rows after `length` are overwritten by those that come next."""

    def reserve(self, rows: int) -> None:
        """Make room for `rows`, keeping what is there."""
        cache, page = self.cache, self.cache.keys.shape[2]
        pages = len(cache.keys)
        if rows <= pages * page:
            return
        wanted = max(2 * pages, -(-rows // page))
        grown = _pages(wanted, cache.keys.shape[1:], cache.keys.dtype, cache.keys.device)
        grown.keys[:pages], grown.values[:pages] = cache.keys, cache.values
        self.cache = grown


@dataclass(frozen=True)
class TritonKernels:
    """`Kernels` with the tactics of `target`.

    Attributes:
        weights: Where experts are found; they are brought into the kernels' layout once.
        target: Whose tactics are taken; the tensors' device decides where kernels run.
    """

    weights: Weights
    target: GpuTarget
    _experts: dict[str, Any] = field(default_factory=dict)

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
        """See `Kernels`. Sequences keep pages of their own and are launched one after the other."""
        attention = plugin.load("gated_attention", "launch")
        geometry = plugin.load("gated_attention", "geometry").Geometry.of(layer, eps, QUERIES)
        entries = tactics.load("gated_attention", self.target.capability).entries
        frequencies = torch.from_numpy(inverse_frequencies(layer)).to(q.device)
        outputs, start = [], 0
        for length, past, caches in zip(batch.lengths, batch.pasts, batch.caches, strict=True):
            part = slice(start, start + length)
            start += length
            shape = layer.kv_heads, geometry.page, layer.head_dim
            rows = PagedRows(_pages(FIRST_PAGES, shape, q.dtype, q.device))
            if caches is not None:
                kept = caches.setdefault(layer.index, rows)
                assert isinstance(kept, PagedRows)
                rows = kept
            rows.reserve(past + length)
            outputs.append(
                attention.gated_attention(
                    q[part],
                    k[part],
                    v[part],
                    gate[part],
                    q_gamma,
                    k_gamma,
                    frequencies,
                    rows.cache,
                    _sequence(length, past, q.device),
                    geometry,
                    entries,
                )
            )
        return torch.cat(outputs)

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
        """See `Kernels`. Experts multiply bf16, whatever the activations' type."""
        launch, geometry = plugin.load("sparse_moe", "launch"), plugin.load("sparse_moe", "geometry")
        stacks = self._stacks(experts)
        count, inner, hidden = stacks.gate.values.shape
        described = geometry.Geometry(count, top_k, hidden, inner, scale, "bf16")
        entries = tactics.load("sparse_moe", self.target.capability).entries
        ids, mix = launch.route_selection(selection, weights, described, entries)
        out = torch.empty_like(x)
        narrow = x.to(torch.bfloat16)
        result: Tensor = launch.experts(narrow, ids, mix, stacks, described, entries, limit, out=out)
        return result

    def _stacks(self, experts: str) -> Any:
        """`sparse_moe.weights.ExpertWeights` of a layer."""
        if experts not in self._experts:
            weights = plugin.load("sparse_moe", "weights")
            self._experts[experts] = weights.ExpertWeights(
                *(
                    weights.Matrix(
                        self.weights.tensor(f"{experts}.{name}.weight").to(torch.bfloat16).contiguous(), None
                    )
                    for name in ("gate_proj", "up_proj", "down_proj")
                )
            )
        return self._experts[experts]


def _pages(count: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
    wide = torch.ones(shape[0], device=device)
    return plugin.load("gated_attention", "batch").PagedCache(
        torch.empty(count, *shape, dtype=dtype, device=device),
        torch.empty(count, *shape, dtype=dtype, device=device),
        torch.arange(count, dtype=torch.int32, device=device)[None],
        wide,
        wide,
    )


@functools.lru_cache(maxsize=8)
def _sequence(length: int, past: int, device: torch.device) -> Any:
    """The description of one sequence, which all layers of a step share."""
    return plugin.load("gated_attention", "batch").Batch.of((length,), (past,), device)
