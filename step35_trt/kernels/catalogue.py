"""Which kernels there are: the plugins and the compilations that a model needs on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from step35_trt.kernels import plugin, tactics

if TYPE_CHECKING:
    from step35_trt.config import Step35Config
    from step35_trt.kernels.targets import GpuTarget
    from step35_trt.kernels.variant import KernelVariant

PLUGINS = ("gated_attention", "sparse_moe")


def deployment(
    config: Step35Config, target: GpuTarget, plugins: tuple[str, ...] = PLUGINS
) -> list[KernelVariant]:
    """Every compilation that running `config` on `target` asks for.

    Raises:
        UnsupportedError: a plugin has no tactics for `target`.
    """
    found: list[KernelVariant] = []
    for name in plugins:
        entries = tactics.load(name, target.capability)
        found += plugin.load(name, "variants").variants(config, target.capability, entries)
    return found
