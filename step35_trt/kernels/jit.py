"""Kernels compiled by Triton when they are first launched, or interpreted by it on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from step35_trt.kernels import interpreter, plugin

if TYPE_CHECKING:
    from step35_trt.kernels.launching import KernelLaunch


@dataclass(frozen=True)
class JitLauncher:
    """`Launcher` by Triton, which is imported with the first launch.

    On CUDA tensors kernels run on the current GPU; on CPU tensors in Triton's interpreter, which has to be
    asked for (`TRITON_INTERPRET=1`) before the kernels are loaded.
    """

    @property
    def interpreted(self) -> bool:
        """See `Launcher`."""
        return interpreter.wanted()

    def __call__(self, launch: KernelLaunch) -> None:
        """See `Launcher`."""
        function = getattr(plugin.load(launch.plugin, launch.module), launch.function)
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        function[launch.grid](*launch.arguments, **launch.constants, **options)


JIT = JitLauncher()
