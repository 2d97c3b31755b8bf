"""Times on a GPU: medians of graph replays with a cold cache, and what the card itself can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

WARM_MS, MEASURED_MS = 20, 100  # for each figure


@dataclass(frozen=True)
class Card:
    """What the card reaches in the same run.

    Attributes:
        name: As the driver calls it.
        copy_bandwidth: Bytes per second read plus written, copying 2 GiB.
        matmul_rate: bf16 multiplications and additions per second, 8192 cubed.
        launch_seconds: Of a kernel that does nothing.
    """

    name: str
    copy_bandwidth: float
    matmul_rate: float
    launch_seconds: float

    @classmethod
    def measure(cls, device: torch.device) -> Card:
        """Measure it."""
        size, n = 1 << 31, 8192
        source, target = torch.ones(2, size, dtype=torch.uint8, device=device)
        a, b = torch.randn(2, n, n, dtype=torch.bfloat16, device=device)
        return cls(
            torch.cuda.get_device_name(device),
            2 * size / seconds(lambda: target.copy_(source)),
            2 * n**3 / seconds(lambda: a @ b),
            seconds(torch.zeros(1, device=device).zero_),
        )


def seconds(call: Callable[[], object]) -> float:
    """Median time of `call` replayed as a CUDA graph, so that the host's work does not count.

    The second-level cache is overwritten before each replay. `call` must not wait for the device.
    """
    call()  # compiles, and takes the memory that a capture may not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return eager_seconds(graph.replay)


def eager_seconds(call: Callable[[], object]) -> float:
    """As `seconds`, called from the host each time."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=WARM_MS, rep=MEASURED_MS, return_mode="median")) / 1e3
