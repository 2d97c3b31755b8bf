"""What a bundle executes: steps on caches, as data."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

CacheKind = Literal["linear", "compacting", "ring"]


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
