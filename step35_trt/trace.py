"""The tracing dialect: the model as the list of operations it asks for, with their types and origins.

A trace is what a compiler that works piecewise needs to know before it starts: what is computed, in which
order, and which values are still needed later.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from step35_trt import model
from step35_trt.config import LayerSpec
from step35_trt.errors import UnsupportedError
from step35_trt.sharing import ALONE, Sharing
from step35_trt.signatures import Signatures, Site, Type, Vector, call_site

if TYPE_CHECKING:
    from step35_trt.config import Step35Config
    from step35_trt.weight_forms import Forms


@dataclass(frozen=True)
class Value:
    """The result of an operation, or an input; `index` counts both in the order they came."""

    index: int
    type: Type


# What ranks do together.
COLLECTIVES = frozenset({"all_reduce", "all_gather"})
# A string is a weight's name, or the prefix of a layer's experts.
Argument = Value | Vector | LayerSpec | str | float | int


@dataclass(frozen=True)
class Call:
    """One operation: the word of `Ops`, its arguments and result, and where the model wrote it."""

    word: str
    arguments: tuple[Argument, ...]
    result: Value
    site: Site

    @property
    def operands(self) -> tuple[Value, ...]:
        """The arguments that are activations."""
        return tuple(a for a in self.arguments if isinstance(a, Value))


@dataclass
class Trace:
    """A graph of the model: named inputs, operations in order, named outputs.

    Attributes:
        forms: Of a rank's weights.
        inputs: By name.
        calls: In order.
        outputs: By name.
        partial: Values of which each rank has but a summand.
        sliced: Values of which each rank has but some features.
        said: Which of the model's values each value is, where ranks exchange something: inputs count first,
            then the model's own operations, and what is exchanged is the same value.
    """

    forms: Forms
    inputs: dict[str, Value] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    outputs: dict[str, Value] = field(default_factory=dict)
    partial: set[int] = field(default_factory=set)
    sliced: set[int] = field(default_factory=set)
    said: dict[int, int] = field(default_factory=dict)

    def input(self, name: str, type_: Type) -> Value:
        """Declare an input; all of them come before the first operation."""
        assert not self.calls
        value = self.inputs[name] = Value(len(self.inputs), type_)
        self.said[value.index] = value.index
        return value


@dataclass(frozen=True)
class TraceOps:
    """`Ops[Value, Vector]` that records what one rank does.

    Sums over ranks are put where a whole value is first needed, so that summands are added up before.
    """

    trace: Trace
    sharing: Sharing = ALONE

    def vector(self, name: str) -> Vector:
        """See `Ops`."""
        return Vector(name)

    def plus_one(self, vector: Vector) -> Vector:
        """See `Ops`."""
        return replace(vector, plus=vector.plus + 1.0)

    def embedding(self, token_ids: Value, weight: str) -> Value:
        """See `Ops`."""
        return self._record("embedding", token_ids, weight)

    def rows(self, x: Value, index: Value) -> Value:
        """See `Ops`."""
        return self._record("rows", x, index)

    def concat(self, a: Value, b: Value) -> Value:
        """See `Ops`."""
        return self._record("concat", a, b)

    def add(self, a: Value, b: Value) -> Value:
        """See `Ops`."""
        if self.trace.partial.issuperset((a.index, b.index)):
            return self._partial(self._call("add", a, b))
        return self._record("add", a, b)

    def linear(self, x: Value, weight: str) -> Value:
        """See `Ops`."""
        result, axis = self._record("linear", x, weight), self.sharing.axis(weight)
        if axis == "columns":
            self.trace.sliced.discard(result.index)
            return self._partial(result)
        if axis == "rows":
            self.trace.sliced.add(result.index)
        # Of what is cut by rows only the head's result is needed whole.
        head = axis == "rows" and not weight.endswith("_proj.weight")
        return self._record("all_gather", result, self.sharing.ranks) if head else result

    def linear_fp32(self, x: Value, weight: str) -> Value:
        """See `Ops`."""
        return self._record("linear_fp32", x, weight)

    def bias(self, x: Value, vector: Vector) -> Value:
        """See `Ops`."""
        return self._record("bias", x, vector)

    def sigmoid(self, x: Value) -> Value:
        """See `Ops`."""
        return self._record("sigmoid", x)

    def swiglu(self, gate: Value, up: Value, limit: float) -> Value:
        """See `Ops`."""
        return self._record("swiglu", gate, up, limit)

    def rms_norm(self, x: Value, gamma: Vector, eps: float) -> Value:
        """See `Ops`."""
        return self._record("rms_norm", x, gamma, eps)

    def gated_attention(
        self,
        q: Value,
        k: Value,
        v: Value,
        gate: Value,
        q_gamma: Vector,
        k_gamma: Vector,
        eps: float,
        layer: LayerSpec,
    ) -> Value:
        """See `Ops`."""
        if self.sharing.axis(f"{layer.prefix}.self_attn.q_proj.weight"):
            ranks = self.sharing.ranks
            heads, groups = layer.query_heads // ranks, layer.kv_heads // ranks
            layer = replace(layer, query_heads=heads, kv_heads=groups)
        return self._record("gated_attention", q, k, v, gate, q_gamma, k_gamma, eps, layer)

    def sparse_moe(
        self,
        x: Value,
        selection: Value,
        weights: Value,
        experts: str,
        top_k: int,
        scale: float,
        limit: float,
    ) -> Value:
        """See `Ops`."""
        mixed = self._record("sparse_moe", x, selection, weights, experts, top_k, scale, limit)
        return self._partial(mixed) if self.sharing.axis(f"{experts}.down_proj.weight") else mixed

    def whole(self, value: Value) -> Value:
        """A value on every rank."""
        return self._call("all_reduce", value) if value.index in self.trace.partial else value

    def _partial(self, value: Value) -> Value:
        self.trace.partial.add(value.index)
        return value

    def _record(self, word: str, *arguments: Argument) -> Value:
        return self._call(word, *(self.whole(a) if isinstance(a, Value) else a for a in arguments))

    def _call(self, word: str, *arguments: Argument) -> Value:
        site = call_site()
        type_ = checked(site, self.trace.forms, word, *arguments)
        trace, operands = self.trace, [a.index for a in arguments if isinstance(a, Value)]
        result = Value(len(trace.inputs) + len(trace.calls), type_)
        trace.calls.append(Call(word, arguments, result, site))
        if word in COLLECTIVES:
            trace.said[result.index] = trace.said[operands[0]]
            return result
        trace.said[result.index] = 1 + max(trace.said.values())
        if trace.sliced.intersection(operands):
            trace.sliced.add(result.index)
        return result


def checked(site: Site, forms: Forms, word: str, *arguments: object) -> Type:
    """The type of an operation's result.

    Raises:
        UnsupportedError: its operands do not fit; the module and the line of the model are named.
    """
    try:
        type_: Type = getattr(Signatures(forms), word)(*arguments)
    except UnsupportedError as error:
        raise UnsupportedError(f"{site}: {word}: {error.message}") from None
    return type_


def trace_decoder(config: Step35Config, forms: Forms, sharing: Sharing = ALONE) -> Trace:
    """The main stack: inputs `token_ids [t]`, `rows [r]`; outputs `logits [r, V]`, `hidden [t, D]`.

    Args:
        config: The model.
        forms: Of the whole model's weights.
        sharing: What one rank of several does.
    """
    trace = Trace(sharing.share(forms))
    ops, (ids, rows) = TraceOps(trace, sharing), _declare(trace)
    logits, hidden = model.decoder(ops, config, ids, rows)
    trace.outputs = {"logits": logits, "hidden": ops.whole(hidden)}
    return trace


def trace_mtp(config: Step35Config, forms: Forms, module: int, sharing: Sharing = ALONE) -> Trace:
    """An MTP module: as `trace_decoder`, with the input `carried [t, D]`, what it continues from."""
    trace = Trace(sharing.share(forms))
    ops, (ids, rows) = TraceOps(trace, sharing), _declare(trace)
    carried = trace.input("carried", Type(forms.activation, config.hidden_size, "tokens"))
    logits, hidden = model.mtp_module(ops, config, module, ids, carried, rows)
    trace.outputs = {"logits": logits, "hidden": ops.whole(hidden)}
    return trace


def _declare(trace: Trace) -> tuple[Value, Value]:
    ids = trace.input("token_ids", Type("int64", 0, "tokens"))
    return ids, trace.input("rows", Type("int64", 0, "rows"))
