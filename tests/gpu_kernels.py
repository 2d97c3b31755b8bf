"""Kernels that are not compiled, for tests of what is around them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from step35_trt.kernels.artefact import CompiledKernel, Facts, Launch, Resources

if TYPE_CHECKING:
    from collections.abc import Sequence

    from step35_trt.kernels.targets import GpuTarget
    from step35_trt.kernels.variant import KernelVariant


def uncompiled(variants: Sequence[KernelVariant], target: GpuTarget) -> list[CompiledKernel]:
    """As `compile_kernels`; each has one byte of code."""
    launch = Launch(entry="k", arguments=(), num_warps=1, shared_bytes=0, scratch_bytes=0)
    used = Resources(registers=1, stack_bytes=0, spill_store_bytes=0, spill_load_bytes=0)
    facts = Facts(target=target.name, triton="none", launch=launch, resources=used, digests={})
    return [CompiledKernel(variant, target, "", b"k", facts) for variant in variants]
