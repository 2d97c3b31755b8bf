"""What a bundle executes, as data: graphs on caches, or segments and kernels step by step."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from step35_trt.steps import StepProgram

CacheKind = Literal["linear", "compacting", "ring"]
# How experts lie for the kernels: `plugins/sparse_moe/pack.py`.
ExpertFormat = Literal["bf16", "fp8_channel", "fp8_block", "int4"]


class CacheSpec(BaseModel):
    """A layer's key/value cache `[1, kv_heads, capacity, head_dim]` fp32.

    `linear` holds row p at p; `ring` at p modulo the capacity; `compacting` is ONNX Runtime's window cache,
    which keeps the latest rows contiguous and moves them when it is full. `window` is 0 for linear.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    layer: int
    kind: CacheKind
    kv_heads: int
    head_dim: int
    window: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one position's keys and values."""
        return 2 * self.kv_heads * self.head_dim * 4


class Segment(BaseModel):
    """A compiled piece of dense algebra and plugins, run by one back end.

    `library` holds the operators of ours that the graph uses, compiled for one kind of processor.
    `dense_bytes` of weights are read in every call, `expert_bytes` is one expert of every MoE layer together.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["segment"] = "segment"
    file: str
    backend: Literal["onnxruntime"] = "onnxruntime"
    library: str | None = None
    caches: tuple[CacheSpec, ...]
    dense_bytes: int
    expert_bytes: int
    top_k: int

    @property
    def bytes_per_token(self) -> int:
        """Weight bytes read to decode one token."""
        return self.dense_bytes + self.top_k * self.expert_bytes


class Program(BaseModel):
    """`program.json`: the decoder and, in order, the MTP modules."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    decoder: tuple[Segment, ...]
    mtp: tuple[tuple[Segment, ...], ...]


class TokenRange(BaseModel):
    """Packed tokens of a call that engines are tuned for: at least, mostly, at most."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    least: int
    mostly: int
    most: int


class KernelFile(BaseModel):
    """Machine code of a kernel and how it is launched; `constants` are compiled in."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    plugin: str
    name: str
    code: str
    launch: str
    constants: dict[str, int | float | bool | str | None]


class WeightPlace(BaseModel):
    """Where a tensor lies: a file of the bundle, a byte offset on a page's start, numpy's dtype and shape."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]


class SteppedProgram(BaseModel):
    """`program.json` of a GPU bundle: segments and kernels as steps, and where what they need lies.

    Attributes:
        decoder: The main stack.
        mtp: The MTP modules, in order.
        ranges: What every engine has an optimisation profile for, in this order.
        segments: File of each engine by the key that steps name it by.
        kernels: All that the steps' plugins may launch.
        weights: By the parameter's name; its scales by that name with `.scales`.
        experts: Format of a layer's stacked experts, by the prefix that steps name them by.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    decoder: StepProgram
    mtp: tuple[StepProgram, ...]
    ranges: tuple[TokenRange, ...]
    segments: dict[str, str]
    kernels: tuple[KernelFile, ...]
    weights: dict[str, WeightPlace]
    experts: dict[str, ExpertFormat]

    @property
    def programs(self) -> tuple[StepProgram, ...]:
        """The decoder's and then the modules'."""
        return (self.decoder, *self.mtp)

    @property
    def files(self) -> frozenset[str]:
        """Every file that running it needs."""
        code = (name for kernel in self.kernels for name in (kernel.code, kernel.launch))
        return frozenset((*self.segments.values(), *code, *(place.file for place in self.weights.values())))
