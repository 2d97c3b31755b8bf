"""Where executions of engines are queued."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from step35_trt.runtime.device.engine_runtime import EngineContext


class Streams(Protocol):
    """Of the device that engines run on."""

    @property
    def current(self) -> int:
        """Handle of the stream that torch's own work is queued on."""
        ...

    @property
    def own(self) -> int:
        """Handle of a stream that recordings may be made of."""
        ...

    def enqueue(self, context: EngineContext) -> None:
        """Queue an execution after torch's work so far and before what it queues next."""
        ...


@dataclass(frozen=True)
class CudaStreams:
    """`Streams` of a GPU.

    On the default stream TensorRT waits for the device with every execution, so there it is given another
    one, and the two wait for each other. All else, a recording above all, is torch's current stream.

    Attributes:
        device: The GPU.
        aside: Not the default stream.
    """

    device: torch.device
    aside: torch.cuda.Stream

    @property
    def current(self) -> int:
        """See `Streams`."""
        handle: int = torch.cuda.current_stream(self.device).cuda_stream
        return handle

    @property
    def own(self) -> int:
        """See `Streams`."""
        handle: int = self.aside.cuda_stream
        return handle

    def enqueue(self, context: EngineContext) -> None:
        """See `Streams`."""
        current = torch.cuda.current_stream(self.device)
        if current != torch.cuda.default_stream(self.device):
            context.enqueue(current.cuda_stream)
            return
        self.aside.wait_stream(current)
        context.enqueue(self.own)
        current.wait_stream(self.aside)


class HostStreams:
    """`Streams` where work is done at once."""

    current = own = 0

    def enqueue(self, context: EngineContext) -> None:
        """See `Streams`."""
        context.enqueue(0)


def streams_of(device: torch.device) -> Streams:
    """Those of a device."""
    if device.type != "cuda":
        return HostStreams()
    return CudaStreams(device, torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
