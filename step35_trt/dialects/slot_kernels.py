"""The torch dialect's plugins over pages that slots name, for steps whose numbers lie on the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from step35_trt.dialects import device_values
from step35_trt.dialects.torch_kernels import frequencies
from step35_trt.kernels import plugin, tactics

if TYPE_CHECKING:
    from torch import Tensor

    from step35_trt.config import LayerSpec
    from step35_trt.dialects.torch import HeldWeights, SequenceBatch
    from step35_trt.dialects.torch_kernels import TritonKernels
    from step35_trt.kernels.targets import GpuTarget
    from step35_trt.runtime.cache.cache_extent import TableSpec
    from step35_trt.runtime.device.device_pages import DevicePages


class Launches(Protocol):
    """The two plugins on tensors."""

    def attention(self, *arguments: Any) -> Tensor:
        """`gated_attention.launch.gated_attention` without its tactics."""
        ...

    def experts(self, *arguments: Any) -> Tensor:
        """`Ops.sparse_moe`."""
        ...


@dataclass(frozen=True)
class TritonLaunches:
    """By our kernels, compiled beforehand or by Triton when first used, as `kernels` has them launched.

    Attributes:
        kernels: Run the experts.
        target: Whose tactics are taken.
    """

    kernels: TritonKernels
    target: GpuTarget

    def attention(self, *arguments: Any) -> Tensor:
        """See `Launches`."""
        launch = plugin.load("gated_attention", "launch")
        entries = tactics.load("gated_attention", self.target.capability).entries
        result: Tensor = launch.gated_attention(*arguments, entries, self.kernels.launcher)
        return result

    def experts(self, *arguments: Any) -> Tensor:
        """See `Launches`."""
        return self.kernels.sparse_moe(*arguments)


@dataclass(frozen=True)
class PlainLaunches:
    """In plain torch (`device_values`).

    Attributes:
        weights: Where experts are found.
    """

    weights: HeldWeights

    def attention(self, *arguments: Any) -> Tensor:
        """See `Launches`."""
        return device_values.paged_attention(*arguments)

    def experts(
        self,
        x: Tensor,
        selection: Tensor,
        weights: Tensor,
        experts: str,
        top_k: int,
        scale: float,
        limit: float,
    ) -> Tensor:
        """See `Launches`."""
        chosen = experts, top_k, scale, limit
        return device_values.every_expert(x, selection, weights, self.weights, *chosen)


@dataclass
class SlotKernels:
    """`Kernels`: which tokens and slots a step is for is told by `place` before it runs.

    Attributes:
        caches: Where keys and values lie.
        launches: What computes.
        queries: The most new tokens of a sequence that count as decoding; see `Geometry`.
    """

    caches: DevicePages
    launches: Launches
    queries: int
    _batch: Any = None
    _slots: Tensor | None = None
    _lines: dict[TableSpec, Tensor] = field(default_factory=dict)

    def place(self, batch: Any, slots: Tensor) -> None:
        """Say what follows is about.

        Args:
            batch: `gated_attention.batch.Batch` or `DeviceBatch`.
            slots: `[sequences]` int32 on the device.
        """
        self._batch, self._slots, self._lines = batch, slots, {}

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
        """See `Kernels`; the step is the one that was placed, whatever `batch` says."""
        module, page = plugin.load("gated_attention", "geometry"), self.caches.extent.page
        geometry = module.Geometry.of(layer, eps, self.queries, page)
        cache = self.caches.cache(layer.index, self._line(layer.index))
        turns = frequencies(layer, q.device)
        return self.launches.attention(q, k, v, gate, q_gamma, k_gamma, turns, cache, self._batch, geometry)

    def _line(self, layer: int) -> Tensor:
        """Looked up once a step, in the tables that the step's graph has."""
        spec = self.caches.layout.table(layer)
        if spec not in self._lines:
            assert self._slots is not None
            self._lines[spec] = self.caches.lines(spec, self._slots)
        return self._lines[spec]

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
        """See `Kernels`."""
        return self.launches.experts(x, selection, weights, experts, top_k, scale, limit)
