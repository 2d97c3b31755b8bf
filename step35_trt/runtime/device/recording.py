"""Work that is recorded once and replayed on the same memory: CUDA graphs, behind one word."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

WARM = 2  # runs before a recording: kernels are compiled and libraries take their memory in the first


class Recorder(Protocol):
    """Records work that decides nothing by values on the device."""

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run the work, and give what runs it again on what its inputs hold then."""
        ...


class GraphRecorder:
    """CUDA graphs of one device, which share memory for what is alive within a replay only.

    So no two of them may run at once, which a session's one thread does not do.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """See `Recorder`; when it returns, the device has done the work."""
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM):
                work()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        # Only this thread is held to what a recording allows: NCCL's own looks at events meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        self._graphs.add(graph)
        graph.replay()  # capturing ran nothing
        torch.cuda.synchronize(self.device)
        replay: Callable[[], None] = graph.replay
        return replay

    def release(self) -> None:
        """Give up all recordings; nothing can be replayed afterwards."""
        torch.cuda.synchronize(self.device)
        for graph in self._graphs:
            graph.reset()
