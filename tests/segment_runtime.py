"""An `EngineRuntime` for the CPU: real engines, executed by torch on the memory that they are pointed to.

What an engine takes is asked of the network and of the profiles that its builder was given, so nothing here
can agree with a session on something that TensorRT does not know.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from step35_trt.dialects.tensorrt_functional import DATA_TYPES
from step35_trt.dialects.tensorrt_segment import Builder, Profile
from step35_trt.dialects.torch import SequenceBatch, TorchOps
from step35_trt.progress import silent
from step35_trt.runtime.device.engine_runtime import EngineTensor
from step35_trt.runtime.programs.program_weights import DTYPES, decoded
from step35_trt.signatures import Vector

if TYPE_CHECKING:
    from pathlib import Path

    from step35_trt.dialects.tensorrt import Weights
    from step35_trt.dialects.tensorrt_functional import Functional
    from step35_trt.dialects.tensorrt_segment import Engine
    from step35_trt.progress import Progress
    from step35_trt.runtime.device.engine_runtime import Scratch
    from step35_trt.segments import Segment
    from step35_trt.weight_forms import Forms

NAMES = {name: dtype for dtype, name in DATA_TYPES.items()}
STORED = DTYPES | {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "int8": torch.int8,
    "int4": torch.uint8,
    "int64": torch.int64,
}


@dataclass(frozen=True)
class Blueprint:
    """What an engine was built from."""

    segment: Segment
    forms: Forms
    tensors: dict[str, EngineTensor]
    ranges: tuple[Profile, ...]


class _Watched:
    """A builder of TensorRT's; the configurations that it makes, and the profiles of the last."""

    def __init__(self, builder: Any) -> None:
        self.builder, self.profiles, self.configs = builder, list[Any](), list[Any]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.builder, name)

    def create_builder_config(self) -> Any:
        self.profiles.clear()
        self.configs.append(self.builder.create_builder_config())
        return self.configs[-1]

    def create_optimization_profile(self) -> Any:
        self.profiles.append(self.builder.create_optimization_profile())
        return self.profiles[-1]


class RememberingBuilder(Builder):
    """Builds for DGX Spark, whatever is asked for, and keeps the blueprints by the engines' digests."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.builder = _Watched(self.builder)
        self.written: dict[int, tuple[Segment, Forms]] = {}
        self.blueprints: dict[str, Blueprint] = {}

    @classmethod
    def of(cls, *_: object) -> RememberingBuilder:
        return cls(importlib.import_module("tensorrt_rtx"))

    def write(self, segment: Segment, forms: Forms, weights: Weights | None = None) -> Functional:
        functional = super().write(segment, forms, weights)
        self.written[id(functional)] = segment, forms
        return functional

    def build(
        self,
        written: Functional,
        ranges: tuple[Profile, ...],
        capability: str,
        progress: Progress = silent,
    ) -> Engine:
        engine = super().build(written, ranges, "12.1", progress)
        network = written.network
        inputs = [network.get_input(i) for i in range(network.num_inputs)]
        outputs = [network.get_output(i) for i in range(network.num_outputs)]
        tensors = {
            t.name: EngineTensor(NAMES[t.dtype.name], tuple(t.shape), output=t in outputs)
            for t in inputs + outputs
        }
        shapes = [profile.get_shape("x0") for profile in self.builder.profiles]
        found = tuple(Profile(*(next(iter(size)) for size in sizes)) for sizes in shapes)
        self.blueprints[_digest(engine.data)] = Blueprint(*self.written[id(written)], tensors, found)
        return engine


@dataclass
class TorchRuntime:
    """`EngineRuntime`.

    Attributes:
        blueprints: By digest.
        records: Whether engines say that they can be recorded.
        loaded: Engines, in order.
        kept: How often it was told to keep what was compiled.
    """

    blueprints: dict[str, Blueprint]
    records: bool = True
    loaded: list[TorchEngine] = field(default_factory=list)
    kept: int = 0

    def load(self, file: Path) -> TorchEngine:
        blueprint = self.blueprints[_digest(file.read_bytes())]
        self.loaded.append(TorchEngine(self, blueprint, blueprint.tensors, blueprint.ranges))
        return self.loaded[-1]

    def keep(self) -> None:
        self.kept += 1

    @property
    def contexts(self) -> list[TorchContext]:
        return [context for engine in self.loaded for context in engine.contexts]


@dataclass
class TorchEngine:
    """`LoadedEngine`."""

    runtime: TorchRuntime
    blueprint: Blueprint
    tensors: dict[str, EngineTensor]
    ranges: tuple[Profile, ...]
    contexts: list[TorchContext] = field(default_factory=list)

    @property
    def scratch_bytes(self) -> int:
        return 1000 * len(self.tensors)

    def context(self, profile: int, scratch: Scratch, stream: int, *, returning: bool) -> TorchContext:
        assert scratch.nbytes >= self.scratch_bytes
        self.contexts.append(TorchContext(self, self.ranges[profile], scratch, returning))
        return self.contexts[-1]


@dataclass
class TorchContext:
    """`EngineContext`: remembers what it was told, and runs only once it was told all."""

    engine: TorchEngine
    range: Profile
    scratch: Scratch
    returning: bool
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)
    runs: int = 0

    def resize(self, name: str, shape: tuple[int, ...]) -> None:
        declared = self.engine.tensors[name]
        assert declared.sized
        assert not (self.returning and self.runs), "a recorded context gets another shape"
        assert [d in (-1, s) for d, s in zip(declared.shape, shape, strict=True)].count(False) == 0
        self.shapes[name] = shape

    def place(self, name: str, address: int) -> None:
        assert name in self.engine.tensors
        self.places[name] = address

    def recordable(self, stream: int) -> bool:
        return self.engine.runtime.records

    def enqueue(self, stream: int) -> None:
        declared, segment = self.engine.tensors, self.engine.blueprint.segment
        assert self.places.keys() == declared.keys(), f"{declared.keys() - self.places.keys()} lie nowhere"
        assert self.shapes.keys() == {name for name, t in declared.items() if t.sized}
        [tokens] = {shape[0] for shape in self.shapes.values()}
        assert self.range.least <= tokens <= self.range.most
        memory = {name: _memory(self.places[name], t, tokens) for name, t in declared.items()}
        self.runs += 1
        ops = _Words(_Placed(memory, self.engine.blueprint))
        given = [memory[f"x{i}"] for i in range(len(segment.inputs))]
        for i, value in enumerate(segment.replay(ops, given)):
            memory[f"y{i}"].copy_(value)


@dataclass(frozen=True)
class _Placed:
    """`dialects.torch.HeldWeights` of what lies at an engine's inputs."""

    memory: dict[str, torch.Tensor]
    blueprint: Blueprint

    def tensor(self, name: str) -> torch.Tensor:
        alias, forms = self.blueprint.segment.alias()[name], self.blueprint.forms
        scales = self.memory.get(f"{alias}.scales")
        return decoded(self.memory[alias], scales, forms(name), DTYPES[forms.activation])

    def expert(self, name: str, index: int) -> torch.Tensor:
        raise AssertionError(f"experts are no engine's: {name}, {index}")

    def vector(self, vector: Vector) -> torch.Tensor:
        """With `plus` added already."""
        return self.memory[self.blueprint.segment.alias()[vector.name]][0]


@dataclass(frozen=True)
class _Words:
    """`Ops` by torch, its vectors found in memory."""

    placed: _Placed

    def __getattr__(self, word: str) -> Any:
        said = getattr(TorchOps(self.placed, SequenceBatch((), (), ())), word)
        return lambda *given: said(*(self.placed.vector(a) if isinstance(a, Vector) else a for a in given))


def _memory(address: int, declared: EngineTensor, tokens: int) -> torch.Tensor:
    shape, dtype = declared.of(tokens), STORED[declared.dtype]
    if declared.dtype == "int4":
        shape = *shape[:-1], shape[-1] // 2
    nbytes = math.prod(shape) * dtype.itemsize
    raw = (ctypes.c_uint8 * nbytes).from_address(address)
    return torch.frombuffer(raw, dtype=dtype).view(shape)


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content).hexdigest()
