"""Which stream an execution is queued on, and what waits for what; of streams themselves only the order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from step35_trt.runtime.device.engine_streams import CudaStreams, HostStreams, streams_of

DEVICE = torch.device("cuda", 0)


@dataclass(frozen=True)
class Stream:
    """`torch.cuda.Stream` as far as it is used."""

    cuda_stream: int
    events: list[tuple[int, str, int]]

    def wait_stream(self, other: Stream) -> None:
        self.events.append((self.cuda_stream, "waits for", other.cuda_stream))


@dataclass(frozen=True)
class Context:
    """`EngineContext` that is executed somewhere."""

    events: list[Any]

    def enqueue(self, stream: int) -> None:
        self.events.append(stream)


@pytest.mark.parametrize("current", [0, 5])
def test_nothing_runs_on_the_default_stream(monkeypatch: pytest.MonkeyPatch, current: int) -> None:
    """TensorRT would wait for the device there; a recording is of the current stream alone."""
    events: list[Any] = []
    streams = {handle: Stream(handle, events) for handle in (0, 5, 7)}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: streams[current])
    monkeypatch.setattr(torch.cuda, "default_stream", lambda _: streams[0])
    made: Any = streams[7]
    ours = CudaStreams(DEVICE, made)
    ours.enqueue(Context(events))
    assert (ours.current, ours.own) == (current, 7)
    assert events == ([(7, "waits for", 0), 7, (0, "waits for", 7)] if current == 0 else [5])


def test_the_host_has_none() -> None:
    events: list[Any] = []
    streams = streams_of(torch.device("cpu"))
    assert isinstance(streams, HostStreams)
    streams.enqueue(Context(events))
    assert (streams.current, streams.own, events) == (0, 0, [0])
