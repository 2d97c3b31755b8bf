"""Kernels as TensorRT would launch them: parameters in its order, unique names, the launches' grids."""

from __future__ import annotations

import math
import os
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from step35_trt.config import Step35Config
from step35_trt.dialects.tensorrt_interfaces import Layer, interface
from step35_trt.dialects.tensorrt_plugins import KernelPlugin, register
from step35_trt.errors import UnsupportedError
from step35_trt.kernels import plugin, ptx
from step35_trt.kernels.catalogue import deployment
from step35_trt.kernels.compile import compile_kernels
from step35_trt.kernels.targets import TARGETS
from step35_trt.resources import PUBLISHED
from tests.cpu.kernels import toys

if TYPE_CHECKING:
    from pathlib import Path

HOPPER = TARGETS["sm_90"]
LAYER = Layer(stack=288, limit_bits=(1088421888, 2139095040))
KERNELS = ("prepare", "decode", "reduce", "route_logits", "few_gate_up", "few_down", "grouped_gate_up")


@pytest.fixture(scope="module")
def plugins(kernel_cache: Path) -> dict[str, KernelPlugin]:
    """One of each kind; the session's cache has them where all were compiled already."""
    variants = {v.function: v for v in deployment(Step35Config.load(PUBLISHED), HOPPER)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(kernel_cache))
        compiled = compile_kernels([variants[name] for name in KERNELS], HOPPER)
    return {k.variant.function: KernelPlugin(k, interface(k.variant, LAYER)) for k in compiled}


@pytest.mark.parametrize("name", KERNELS)
def test_parameters_stand_where_tensorrt_passes_them(
    plugins: dict[str, KernelPlugin], name: str, tmp_path
) -> None:  # type: ignore[no-untyped-def]
    made = plugins[name]
    face, found, before = made.interface, ptx.entry(made.ptx), ptx.entry(made.kernel.ptx)
    kinds = ["u64"] * len(face.inputs) + ["u32"] * len(face.integers) + ["u64"] * len(face.outputs)
    assert list(found.types) == kinds
    assert found.name == made.name != before.name
    names = [argument.name for argument in made.kernel.facts.launch.arguments]
    for place, argument in enumerate((*face.inputs, *face.integers)):
        assert found.parameters[place] == before.parameters[names.index(argument)]
    for place, argument in enumerate(face.outputs, len(face.inputs) + len(face.integers)):
        in_place = argument in face.inputs
        assert ("unread" in found.parameters[place]) == in_place
        assert in_place or found.parameters[place] == before.parameters[names.index(argument)]
    (tmp_path / "x.ptx").write_text(made.ptx)
    command = [toys.assembler(), "--gpu-name=sm_90a", str(tmp_path / "x.ptx"), "-o", os.devnull]
    subprocess.run(command, check=True)


def test_names_differ_where_code_does(plugins: dict[str, KernelPlugin]) -> None:
    assert len({made.name for made in plugins.values()}) == len(plugins)


def test_a_kernel_without_an_interface_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="toy/scale"):
        interface(toys.SCALE)


@dataclass(frozen=True)
class Numbers:
    """`Extents` of known shapes."""

    shapes: dict[str, tuple[int, ...]]

    def __call__(self, tensor: str, axis: int) -> int:
        return self.shapes[tensor][axis]

    def least(self, a: int, b: int) -> int:
        return min(a, b)


@pytest.mark.parametrize("tokens", [1, 40, 4096])
def test_the_experts_are_launched_as_in_torch(plugins: dict[str, KernelPlugin], tokens: int) -> None:
    geometry = plugin.load("sparse_moe", "geometry")
    g = geometry.Geometry(288, 8, 4096, 1280, 3.0, "int4")
    made = plugins["few_gate_up"].interface
    numbers = Numbers({"x": (tokens, 4096)})
    rows = plugins["few_gate_up"].kernel.variant.constants["ROWS"]
    assert made.grid(numbers) == (tokens * 8, math.ceil(1280 / rows))
    assert [value(numbers) for value in made.integers.values()] == list(LAYER.limit_bits)
    variants = deployment(Step35Config.load(PUBLISHED), HOPPER, ("sparse_moe",))
    place = next(v for v in variants if v.function == "place_pairs")
    tile, face = int(place.constants["TOKENS"] or 0), interface(place, LAYER)
    ids = Numbers({"ids": (tokens, 8)})
    most = geometry.most_tiles(g, tokens, tile)
    assert [value(ids) for value in face.integers.values()] == [tokens * 8, most]
    assert face.outputs["tiles"].shape(ids) == (1 + 3 * most,)  # type: ignore[misc]
    grouped = plugins["grouped_gate_up"].interface
    assert grouped.grid(Numbers({"tiles": (1 + 3 * most,)}))[1] == most


def test_tensorrt_takes_the_signatures(plugins: dict[str, KernelPlugin]) -> None:
    """Needs the `tensorrt` package, and no GPU."""
    trt = pytest.importorskip("tensorrt")
    pytest.importorskip("tensorrt.plugin")
    for made in plugins.values():
        identity = register(made, trt)
        namespace, name = identity.split("::")
        assert hasattr(getattr(trt.plugin.op, namespace), name)
