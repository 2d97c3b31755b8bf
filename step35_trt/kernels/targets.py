"""The GPUs that kernels are compiled for: hardware limits as data."""

from __future__ import annotations

from dataclasses import dataclass

from step35_trt.errors import UnsupportedError

WARP = 32


@dataclass(frozen=True)
class GpuTarget:
    """Limits of a compute capability (CUDA programming guide, "Technical Specifications").

    Attributes:
        capability: Major and minor number written together: 90 is Hopper, 121 is DGX Spark.
        shared_bytes: Shared memory that one block may use, in bytes.
        summary: Which cards these are.
    """

    capability: int
    shared_bytes: int
    summary: str

    @property
    def name(self) -> str:
        """As tactics files and the command line spell it: `sm_90`."""
        return f"sm_{self.capability}"


TARGETS = {
    target.name: target
    for target in (
        GpuTarget(90, 227 * 1024, "Hopper: H100, H200"),
        GpuTarget(100, 227 * 1024, "Blackwell: B200"),
        GpuTarget(120, 99 * 1024, "Blackwell: RTX 50, RTX PRO 6000"),
        GpuTarget(121, 99 * 1024, "Blackwell: DGX Spark"),
    )
}


def gpu_target(name: str) -> GpuTarget:
    """The target called `name`, such as `sm_90`.

    Raises:
        UnsupportedError: there is none.
    """
    if name not in TARGETS:
        raise UnsupportedError(f"there are no GPU kernels for {name}", f"Known: {', '.join(TARGETS)}.")
    return TARGETS[name]
