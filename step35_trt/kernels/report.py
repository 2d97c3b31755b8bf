"""What can be said of a kernel without running it, and what must hold before it ships."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from step35_trt.kernels import ptx

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from step35_trt.kernels.artefact import CompiledKernel


@dataclass(frozen=True)
class KernelReport:
    """One compiled kernel.

    Attributes:
        kernel: Plugin and variant.
        target: Such as `sm_90`.
        num_warps: Warps of a block.
        registers: Of a thread, at most 255.
        stack_bytes: Local memory of a thread; it lives in the caches and beyond.
        spill_bytes: Of registers stored to and loaded from the stack.
        shared_bytes: Of a block.
        instructions: How often each kind stands in the code (`ptx.INSTRUCTIONS`).
        failures: What must not be, in words; empty where the kernel may ship.
    """

    kernel: str
    target: str
    num_warps: int
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int
    instructions: Mapping[str, int]
    failures: Sequence[str]


def report(kernel: CompiledKernel) -> KernelReport:
    """Read `kernel`'s figures and check them against its target's limits."""
    used, launch, target = kernel.facts.resources, kernel.facts.launch, kernel.target
    spilled = used.spill_store_bytes + used.spill_load_bytes
    failures = []
    if spilled:
        failures.append(f"spills {spilled} bytes of registers")
    elif used.stack_bytes:
        failures.append(f"keeps {used.stack_bytes} bytes on a stack")
    if launch.shared_bytes > target.shared_bytes:
        failures.append(f"takes {launch.shared_bytes} bytes of shared memory of {target.shared_bytes}")
    if ptx.traps(kernel.ptx):
        failures.append("stops by itself: the tile is too large")
    return KernelReport(
        f"{kernel.variant.plugin}/{kernel.variant.name}",
        target.name,
        launch.num_warps,
        used.registers,
        used.stack_bytes,
        spilled,
        launch.shared_bytes,
        ptx.instructions(kernel.ptx),
        tuple(failures),
    )
