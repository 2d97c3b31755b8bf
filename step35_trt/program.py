"""What a bundle executes, as data: graphs on caches, or segments and kernels step by step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from step35_trt.sharing import Part, Sharing, Way
from step35_trt.steps import StepProgram
from step35_trt.weight_forms import BITS

if TYPE_CHECKING:
    from step35_trt.config import LayerSpec

CacheKind = Literal["paged", "linear", "compacting", "ring"]
# How experts lie for the kernels: `plugins/sparse_moe/pack.py`.
ExpertFormat = Literal["bf16", "fp8_channel", "fp8_block", "int4"]


class CacheSpec(BaseModel):
    """A layer's keys and values, fp32; `window` is 0 where a layer has none.

    Engines have them `paged`: `[pages, kv_heads, page, head_dim]`, shared by all sequences, which find their
    rows through a table of pages (`plugins/gated_attention/attend.h`). Exported graphs know one sequence and
    `[1, kv_heads, capacity, head_dim]`: `linear` holds row p at p; `ring` at p modulo the capacity, which
    exceeds the window by the tokens of a call; `compacting` is ONNX Runtime's window cache of any capacity
    from the window up, which keeps the latest rows contiguous and, when it is full, drops
    capacity - window + 1 at once and moves the rest to the front.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    layer: int
    kind: CacheKind
    kv_heads: int
    head_dim: int
    window: int

    @classmethod
    def of(cls, layer: LayerSpec, kind: CacheKind) -> CacheSpec:
        """The cache of a layer."""
        return cls(
            layer=layer.index,
            kind=kind,
            kv_heads=layer.kv_heads,
            head_dim=layer.head_dim,
            window=layer.window,
        )

    @property
    def table(self) -> str:
        """Which table of pages the layer goes by: all window layers advance alike, and so do the others."""
        return "window" if self.window else "full"

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
    """`program.json`: the decoder and, in order, the MTP modules.

    Attributes:
        decoder: The main stack.
        mtp: The MTP modules, in order.
        rounds: Files of graphs of these segments together, which draft 1, 2, ... tokens and verify them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    decoder: tuple[Segment, ...]
    mtp: tuple[tuple[Segment, ...], ...]
    rounds: tuple[str, ...] = ()


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

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * BITS[self.dtype] // 8


class SteppedProgram(BaseModel):
    """`program.json` of a GPU bundle: segments and kernels as steps, and where what they need lies.

    The steps are one rank's, and equal on all of them: ranks differ in their weights alone. Rank r of those
    that deal out `count` experts has `held` of them, from `r * held` on (`steps.SparseMoe`); of heads and
    features likewise.

    Attributes:
        decoder: The main stack.
        mtp: The MTP modules, in order.
        ranges: What every engine has an optimisation profile for, in this order.
        segments: File of each engine by the key that steps name it by.
        kernels: All that the steps' plugins may launch.
        weights: What every rank holds, by the parameter's name; its scales by that name with `.scales`.
        experts: Format of a layer's stacked experts, by the prefix that steps name them by.
        ranks: Devices that run it together.
        ways: How they share which part of the model (`sharing.Sharing`).
        shares: What each rank holds alone, named likewise; none where there is one rank.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    decoder: StepProgram
    mtp: tuple[StepProgram, ...]
    ranges: tuple[TokenRange, ...]
    segments: dict[str, str]
    kernels: tuple[KernelFile, ...]
    weights: dict[str, WeightPlace]
    experts: dict[str, ExpertFormat]
    ranks: int = Field(default=1, gt=0)
    ways: dict[Part, Way] = {}
    shares: tuple[dict[str, WeightPlace], ...] = ()

    @model_validator(mode="after")
    def _shared(self) -> SteppedProgram:
        if len(self.shares) != (self.ranks if self.ranks > 1 else 0):
            raise ValueError(f"{len(self.shares)} shares of weights for {self.ranks} ranks")
        return self

    @property
    def programs(self) -> tuple[StepProgram, ...]:
        """The decoder's and then the modules'."""
        return (self.decoder, *self.mtp)

    @property
    def sharing(self) -> Sharing:
        """How the ranks share the model."""
        return Sharing(self.ranks, self.ways)

    def places(self, rank: int = 0) -> dict[str, WeightPlace]:
        """Where all that a rank holds lies."""
        return self.weights | self.shares[rank] if self.shares else self.weights

    @property
    def files(self) -> frozenset[str]:
        """Every file that running it needs."""
        code = (name for kernel in self.kernels for name in (kernel.code, kernel.launch))
        places = (place.file for held in (self.weights, *self.shares) for place in held.values())
        return frozenset((*self.segments.values(), *code, *places))
