"""Kernels that are not compiled, for tests of what is around them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from step35_trt.kernels.artefact import SCRATCH, Argument, CompiledKernel, Facts, Launch, Resources

if TYPE_CHECKING:
    from collections.abc import Sequence

    from step35_trt.kernels.targets import GpuTarget
    from step35_trt.kernels.variant import KernelVariant

SHARED = 1000  # bytes of the first kernel's shared memory; each that follows has one more


def uncompiled(variants: Sequence[KernelVariant], target: GpuTarget) -> list[CompiledKernel]:
    """As `compile_kernels`; the code of each is its name."""
    used = Resources(registers=1, stack_bytes=0, spill_store_bytes=0, spill_load_bytes=0)
    found = []
    for i, variant in enumerate(variants):
        arguments = tuple(Argument(name=name, type=kind) for name, kind in variant.signature.items())
        launch = Launch(
            entry=variant.function,
            arguments=arguments + SCRATCH,
            num_warps=variant.num_warps,
            shared_bytes=SHARED + i,
            scratch_bytes=0,
        )
        facts = Facts(target=target.name, triton="none", launch=launch, resources=used, digests={})
        found.append(CompiledKernel(variant, target, "", variant.name.encode(), facts))
    return found
