"""Our Triton kernels as TensorRT's quickly deployable plugins: an engine carries their PTX inside.

One kernel is one plugin. TensorRT launches an ahead-of-time plugin with its input tensors, then 32-bit
integers, then its output tensors, and knows kernels by name; so an entry's parameters are put in that order
and its name is made unique. Attributes of a plugin are not serialised: all but shapes of tensors is compiled
in.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from step35_trt.errors import UnsupportedError
from step35_trt.kernels import content, ptx
from step35_trt.kernels.plugin import ROOT
from step35_trt.kernels.targets import WARP

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType

    from step35_trt.kernels.artefact import CompiledKernel

NAMESPACE = "step35"
# TensorRT has no 16-bit integers: words of packed 4-bit codes are handed over two in an INT32.
TYPES = {"bf16": "BF16", "fp16": "FP16", "fp32": "FP32", "fp8e4nv": "FP8", "i32": "INT32", "i16": "INT32"}
_ATTRIBUTES = {"FP16": "HALF", "FP32": "FLOAT"}


class Extents(Protocol):
    """Dimensions of the inputs, as numbers or as TensorRT's symbols."""

    def __call__(self, tensor: str, axis: int) -> Any:
        """A dimension; it may be added to, multiplied and floor-divided by numbers."""
        ...

    def least(self, a: Any, b: Any) -> Any:
        """The smaller one."""
        ...


@dataclass(frozen=True)
class Output:
    """A tensor that a kernel writes: a new one of a shape, or an input changed in place."""

    shape: Callable[[Extents], tuple[Any, ...]] | None = None


@dataclass(frozen=True)
class Interface:
    """How a kernel meets TensorRT.

    Attributes:
        inputs: Arguments that are tensors it reads, in the plugin's order.
        outputs: Arguments that it writes; those that are inputs as well are changed in place.
        integers: What the other arguments are, from the inputs' dimensions.
        grid: Blocks along x, y and z.
    """

    inputs: tuple[str, ...]
    outputs: Mapping[str, Output]
    integers: Mapping[str, Callable[[Extents], Any]]
    grid: Callable[[Extents], tuple[Any, ...]]


@dataclass(frozen=True)
class KernelPlugin:
    """A compiled kernel with its interface."""

    kernel: CompiledKernel
    interface: Interface

    @property
    def name(self) -> str:
        """Unique among kernels of any content: TensorRT finds kernels by it."""
        identity = content.digest(self.kernel.variant, self.kernel.target, ROOT)
        return f"{self.kernel.facts.launch.entry}_{identity[:12]}"

    @property
    def order(self) -> tuple[int | None, ...]:
        """Which of the kernel's parameters stands where TensorRT passes one; None where it reads none."""
        names = [argument.name for argument in self.kernel.facts.launch.arguments]
        face = self.interface
        passed = [*face.inputs, *face.integers]
        written = [None if name in face.inputs else names.index(name) for name in face.outputs]
        return (*(names.index(name) for name in passed), *written)

    @property
    def ptx(self) -> str:
        """The code as TensorRT launches it.

        Raises:
            UnsupportedError: the kernel needs memory that no plugin is given.
            Step35Error: it reads an argument that the interface does not name.
        """
        if self.kernel.facts.launch.scratch_bytes:
            raise UnsupportedError(f"{self.name} needs global scratch memory, which a plugin has not")
        return ptx.arranged(self.kernel.ptx, self.order, self.name)

    def type_of(self, argument: str) -> str:
        """TensorRT's type of a tensor argument, as its type strings spell it."""
        types = {a.name: a.type for a in self.kernel.facts.launch.arguments}
        return TYPES[types[argument].removeprefix("*")]


def register(plugin: KernelPlugin, trt: ModuleType) -> str:
    """Make `plugin` known to the module `tensorrt` (11, or 10.9 and newer); returns its id.

    `tensorrt.plugin.op.step35.<name>(*inputs)` then goes into `INetworkDefinition.add_plugin`. Plugins that
    write in place need the preview feature `ALIASED_PLUGIN_IO_10_03`.
    """
    trtp: Any = trt.plugin
    face, launch = plugin.interface, plugin.kernel.facts.launch
    identity = f"{NAMESPACE}::{plugin.name}"
    code = plugin.ptx
    parameters = [_parameter(name, trtp.TensorDesc) for name in face.inputs]
    several: Any = tuple.__class_getitem__(tuple(trtp.TensorDesc for _ in face.outputs))

    def describe(*inputs: Any) -> tuple[Any, ...]:
        extents, given = _Symbols(trtp, face.inputs, inputs), dict(zip(face.inputs, inputs, strict=True))
        return tuple(
            given[name].aliased()
            if output.shape is None
            else trtp.from_shape_expr(output.shape(extents), _data_type(trt, plugin.type_of(name)))
            for name, output in face.outputs.items()
        )

    def combine(*_: Any) -> list[Any]:
        types = ", ".join(plugin.type_of(name) for name in (*face.inputs, *face.outputs))
        return [trtp.AutoTuneCombination(types, "LINEAR")]

    def implement(*arguments: Any) -> tuple[Any, ...]:
        extents = _Symbols(trtp, face.inputs, arguments[: len(face.inputs)])
        x, y, z = (*face.grid(extents), 1, 1)[:3]
        params = trtp.KernelLaunchParams(x, y, z, launch.num_warps * WARP, 1, 1, launch.shared_bytes)
        integers = trtp.SymIntExprs(len(face.integers))
        for place, value in enumerate(face.integers.values()):
            integers[place] = trtp.SymInt32(value(extents))
        return plugin.name, code, params, integers

    outputs = _parameter("outputs", several)
    result: Any = tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]
    _sign(describe, parameters, several)
    _sign(combine, [*parameters, outputs], list[trtp.AutoTuneCombination])
    _sign(implement, [*parameters, outputs, _parameter("tactic", int)], result)
    trtp.register(identity)(describe)
    trtp.autotune(identity)(combine)
    trtp.aot_impl(identity)(implement)
    return identity


@dataclass(frozen=True)
class _Symbols:
    """`Extents` over TensorRT's descriptors."""

    trtp: Any
    names: tuple[str, ...]
    descriptors: tuple[Any, ...]

    def __call__(self, tensor: str, axis: int) -> Any:
        return self.descriptors[self.names.index(tensor)].shape_expr[axis]

    def least(self, a: Any, b: Any) -> Any:
        return self.trtp.min(a, b)


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)


def _sign(function: Any, parameters: list[inspect.Parameter], result: Any) -> None:
    """Give a generic function the signature that `tensorrt.plugin` reads a plugin's schema from."""
    function.__signature__ = inspect.Signature(parameters, return_annotation=result)


def _data_type(trt: Any, name: str) -> Any:
    return getattr(trt.DataType, _ATTRIBUTES.get(name, name))
