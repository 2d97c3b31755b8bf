"""Which kernels there are: the plugins and the compilations that a model needs on a GPU."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from step35_trt.kernels import plugin, tactics

if TYPE_CHECKING:
    from collections.abc import Iterable

    from step35_trt.config import Step35Config
    from step35_trt.kernels.targets import GpuTarget
    from step35_trt.kernels.variant import KernelVariant
    from step35_trt.lower import ModelPrograms

PLUGINS = ("gated_attention", "sparse_moe")
"""Those that are tuned; dense algebra, which engines have kernels of their own for, is not."""


def deployment(
    config: Step35Config,
    target: GpuTarget,
    plugins: tuple[str, ...] = PLUGINS,
    held: int | None = None,
) -> list[KernelVariant]:
    """Every compilation of the tuned plugins that running `config` on `target` asks for.

    Args:
        config: The model, as wide as the device has it.
        target: The GPU.
        plugins: Of which.
        held: How many of the experts the device has; absent: all.

    Raises:
        UnsupportedError: a plugin has no tactics for `target`.
    """
    found: list[KernelVariant] = []
    for name in plugins:
        entries = tactics.load(name, target.capability)
        variants = plugin.load(name, "variants").variants
        if name == "sparse_moe":
            variants = functools.partial(variants, held=held)
        found += variants(config, target.capability, entries)
    return found


def dense(models: Iterable[ModelPrograms]) -> list[KernelVariant]:
    """Every compilation of dense algebra that some programs ask for, whatever the GPU."""
    from step35_trt.kernels.dense_needs import DenseNeeds

    needs = DenseNeeds.of(models)
    made: list[KernelVariant] = plugin.load("dense", "variants").variants(
        needs.products, needs.norms, needs.gates
    )
    return made


def every(config: Step35Config, target: GpuTarget) -> list[KernelVariant]:
    """Of `config` on `target` in all recipes that come with the package.

    Raises:
        UnsupportedError: a plugin has no tactics for `target`.
    """
    return deployment(config, target) + dense(recipes(config))


def recipes(config: Step35Config) -> list[ModelPrograms]:
    """A model's programs in every recipe that comes with the package and that GPU kernels compute in."""
    from step35_trt.errors import UnsupportedError
    from step35_trt.gpu_forms import deployed_forms
    from step35_trt.lower import ModelPrograms
    from step35_trt.quantize.recipe import Recipe
    from step35_trt.resources import known

    found = []
    for name in known("export"):
        try:
            forms, _ = deployed_forms(Recipe.load(name), config)
        except UnsupportedError:
            continue
        found.append(ModelPrograms.of(config, forms))
    return found
