"""What a program of segments executes: steps on buffers, as data that can be printed, costed and run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from step35_trt.config import LayerSpec, RopeScaling

BufferDtype = Literal["bfloat16", "float32", "int64"]
Operation = Literal["all_reduce", "all_gather"]
RowKind = Literal["tokens", "rows"]
# What a rank has of one of the model's values: all of it, its own run of features, or a part of a sum.
Share = Literal["whole", "slice", "summand"]


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Buffer(_Data):
    """An activation between steps: `[tokens, width]`, or `[tokens]` where the width is 0.

    Attributes:
        name: Unique in the program.
        value: Which of the model's values it is: inputs first, then the results of its operations in order.
            What ranks exchange is the same value before and after.
        share: What a rank has of it.
        path: The module of the model whose result it is.
        dtype: Of its elements.
        width: Features of a row.
        rows: Whether a row is a packed token or one of the rows whose logits are wanted.
        offset: Where it lies in the arena, in bytes for each token of the longest call; buffers that are
            never alive together may overlap.
        first: The step that fills it; -1 for an input of the program.
        last: The last step that reads it; the number of steps for an output of the program.
    """

    name: str
    value: int
    path: str
    dtype: BufferDtype
    width: int = Field(ge=0)
    rows: RowKind
    offset: int = Field(ge=0)
    first: int
    last: int
    share: Share = "whole"

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return max(1, self.width) * {"bfloat16": 2, "float32": 4, "int64": 8}[self.dtype]


class Cost(_Data):
    """What a step moves and computes: products, a multiply-add being two operations; the rest is small.

    Attributes:
        weight_bytes: Read once in every call.
        token_bytes: Activations read and written, and rows looked up, for each token.
        token_flops: For each token.
        expert_bytes: One expert's weights, read once in a call in which any token chose it.
        experts: How many the step holds; 0 where it has none.
        top_k: How many of them a token chooses, on average where other ranks hold others.
        cache_bytes: A cached position's keys and values, read once for each sequence.
        pair_flops: For each query and each key that it sees.
        window: The most keys that a query sees; 0 for all.
    """

    weight_bytes: int = 0
    token_bytes: int = 0
    token_flops: int = 0
    expert_bytes: int = 0
    experts: int = 0
    top_k: float = 0
    cache_bytes: int = 0
    pair_flops: int = 0
    window: int = 0

    def bytes(self, tokens: int, context: int, sequences: int = 1) -> float:
        """Bytes of a call of `tokens` tokens in all, each sequence having `context` positions cached.

        Experts are expected to be chosen evenly and independently.
        """
        untouched = (1 - self.top_k / self.experts) ** tokens if self.experts else 1.0
        positions = min(context, self.window + tokens // sequences) if self.window else context
        cached = self.cache_bytes * positions * sequences
        return (
            self.weight_bytes
            + self.token_bytes * tokens
            + self.expert_bytes * self.experts * (1 - untouched)
            + cached
        )

    def flops(self, tokens: int, context: int) -> float:
        """Operations of a call in which every token sees `context` keys, or its window of them."""
        seen = min(context, self.window) if self.window else context
        return tokens * (self.token_flops + self.pair_flops * seen)


class WeightBinding(_Data):
    """What an engine's input is bound to: a weight's values or scales, or a vector with `plus` added."""

    weight: str
    part: Literal["values", "scales", "vector"]
    plus: float = 0.0


class SegmentStep(_Data):
    """A compiled segment.

    Attributes:
        name: For people: where in the model it ends.
        engine: Key of the engine, which steps of the same shape and precision share.
        inputs: Buffer of each activation, by the engine's name for it.
        outputs: Likewise.
        weights: Weight of each of the engine's other inputs.
        cost: Of a call.
    """

    kind: Literal["segment"] = "segment"
    name: str
    engine: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    weights: dict[str, WeightBinding]
    cost: Cost


class GatedAttention(_Data):
    """The first plugin on one layer (`Ops.gated_attention`); gammas are weights with 1 added."""

    plugin: Literal["gated_attention"] = "gated_attention"
    layer: int
    query_heads: int
    kv_heads: int
    head_dim: int
    window: int
    rope_theta: float
    rotary_dims: int
    rope_scaling: RopeScaling | None
    eps: float
    q_gamma: str
    k_gamma: str

    @property
    def layer_spec(self) -> LayerSpec:
        """What attention needs to know of its layer."""
        return LayerSpec(
            index=self.layer,
            kind="sliding_attention" if self.window else "full_attention",
            query_heads=self.query_heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            window=self.window,
            rope_theta=self.rope_theta,
            rotary_dims=self.rotary_dims,
            rope_scaling=self.rope_scaling,
            moe=False,
            routed_limit=0.0,
            shared_limit=0.0,
        )


class SparseMoe(_Data):
    """The second plugin on one layer (`Ops.sparse_moe`).

    Tokens choose among `count` experts; a rank holds `held` of them and adds up what those contribute: where
    ranks deal experts out, rank r those from `r * held` on. `coding` is how they are coded.
    """

    plugin: Literal["sparse_moe"] = "sparse_moe"
    experts: str
    count: int
    held: int
    top_k: int
    scale: float
    limit: float
    coding: str


class SelectRows(_Data):
    """Rows whose logits are wanted (`Ops.rows`)."""

    plugin: Literal["rows"] = "rows"


class KernelStep(_Data):
    """A plugin; `inputs` are buffers in the order of the operation's arguments."""

    kind: Literal["kernel"] = "kernel"
    name: str
    call: Annotated[GatedAttention | SparseMoe | SelectRows, Field(discriminator="plugin")]
    inputs: tuple[str, ...]
    output: str
    cost: Cost


class CollectiveStep(_Data):
    """What ranks do together: sum every rank's `input`, or put its features side by side."""

    kind: Literal["collective"] = "collective"
    name: str
    operation: Operation
    input: str
    output: str
    cost: Cost


Step = Annotated[SegmentStep | KernelStep | CollectiveStep, Field(discriminator="kind")]


class StepProgram(_Data):
    """One graph of the model.

    Attributes:
        activation: What dense algebra is computed in.
        inputs: Buffer of each input by name.
        outputs: Buffer of each output by name.
        buffers: All of them, in the order in which they are filled.
        steps: In order.
        arena: Bytes of memory that all buffers need for each token of the longest call.
    """

    activation: Literal["bfloat16", "float32"]
    inputs: dict[str, str]
    outputs: dict[str, str]
    buffers: tuple[Buffer, ...]
    steps: tuple[Step, ...]
    arena: int

    @property
    def engines(self) -> tuple[str, ...]:
        """Distinct engines in order of first use."""
        return tuple(dict.fromkeys(step.engine for step in self.steps if step.kind == "segment"))
