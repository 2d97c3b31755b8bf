"""The tensorrt dialect: the vocabulary as layers of an `INetworkDefinition`, over packed tokens.

`t` is the only dynamic dimension. Weights are inputs of the network, so that layers of one shape share what
is compiled, or constants. The two plugins are the host's: TensorRT-RTX has none, there a program ends its
segments at them (`segments.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NoReturn, Protocol

import numpy as np

from step35_trt.errors import UnsupportedError
from step35_trt.signatures import Site, Type, Vector, call_site
from step35_trt.trace import checked

if TYPE_CHECKING:
    from collections.abc import Callable

    from step35_trt.config import LayerSpec
    from step35_trt.dialects.tensorrt_functional import Functional, ITensor
    from step35_trt.weight_forms import Forms, Packed, WeightForm


@dataclass(frozen=True)
class Tensor:
    """A network's tensor with the type that the model declares for it."""

    handle: ITensor
    type: Type


class Weights(Protocol):
    """How weights come into a network."""

    def matrix(self, f: Functional, name: str, form: WeightForm) -> tuple[ITensor, ITensor | None]:
        """`[N, K]` as it is stored, and its scales."""
        ...

    def vector(self, f: Functional, vector: Vector, form: WeightForm) -> ITensor:
        """fp32 `[1, n]`."""
        ...


@dataclass(frozen=True)
class InputWeights:
    """Weights as inputs that are bound at load; codes and scales apart.

    `alias` gives the inputs' names; scales are `{alias}.scales`.
    """

    alias: Callable[[str], str] = lambda name: name

    def matrix(self, f: Functional, name: str, form: WeightForm) -> tuple[ITensor, ITensor | None]:
        """See `Weights`."""
        alias = self.alias(name)
        values = f.input(alias, form.dtype, form.shape)
        if form.scale_dtype is None:
            return values, None
        return values, f.input(f"{alias}.scales", form.scale_dtype, form.scale_shape)

    def vector(self, f: Functional, vector: Vector, form: WeightForm) -> ITensor:
        """See `Weights`."""
        return f.input(self.alias(vector.name), "float32", (1, *form.shape))


@dataclass(frozen=True)
class ConstantWeights:
    """Weights inside the network.

    `packed` gives a weight in its form; of vectors, before anything is added to them. Rows of int8 stay
    inputs under the names of `rows`: the compiler takes no constant of codes that nothing dequantises.
    """

    packed: Callable[[str, WeightForm], Packed]
    rows: InputWeights = field(default_factory=InputWeights)

    def matrix(self, f: Functional, name: str, form: WeightForm) -> tuple[ITensor, ITensor | None]:
        """See `Weights`."""
        if form.dtype == "int8":
            return self.rows.matrix(f, name, form)
        packed = self.packed(name, form)
        values = f.constant(packed.values, form.dtype, form.shape)
        if packed.scales is None or form.scale_dtype is None:
            return values, None
        return values, f.constant(packed.scales, form.scale_dtype)

    def vector(self, f: Functional, vector: Vector, form: WeightForm) -> ITensor:
        """See `Weights`."""
        values = self.packed(vector.name, form).values.astype(np.float32)
        return f.constant((values + np.float32(vector.plus))[None], "float32")


class Plugins(Protocol):
    """How a host with plugins spells the two; arguments as in `Ops`, tensors as handles."""

    def gated_attention(
        self,
        f: Functional,
        inputs: tuple[ITensor, ITensor, ITensor, ITensor],
        gammas: tuple[ITensor, ITensor],
        eps: float,
        layer: LayerSpec,
    ) -> ITensor:
        """`Ops.gated_attention`."""
        ...

    def sparse_moe(
        self,
        f: Functional,
        inputs: tuple[ITensor, ITensor, ITensor],
        experts: str,
        top_k: int,
        scale: float,
        limit: float,
    ) -> ITensor:
        """`Ops.sparse_moe`."""
        ...


class NoPlugins:
    """A host without plugins, such as TensorRT-RTX."""

    def gated_attention(self, f: Functional, *_: object) -> NoReturn:
        """See `Plugins`."""
        self._refuse(f, "gated_attention")

    def sparse_moe(self, f: Functional, *_: object) -> NoReturn:
        """See `Plugins`."""
        self._refuse(f, "sparse_moe")

    def _refuse(self, f: Functional, word: str) -> NoReturn:
        raise UnsupportedError(
            f"{f.where()}: {word} is a plugin and {f.trt.__name__} hosts none",
            "Compile the model as a program of segments, which end at the plugins.",
        )


@dataclass
class TensorRtOps:
    """`Ops[Tensor, Vector]` that writes into `f.network`.

    `site` says where in the model an operation was written.
    """

    f: Functional
    forms: Forms
    weights: Weights
    plugins: Plugins
    site: Callable[[], Site] = call_site
    _decoded: dict[str, ITensor] = field(default_factory=dict)

    def input(self, name: str, type_: Type) -> Tensor:
        """A network input of packed tokens."""
        shape = (-1, type_.width) if type_.width else (-1,)
        return Tensor(self.f.input(name, type_.dtype, shape), type_)

    def vector(self, name: str) -> Vector:
        """See `Ops`."""
        return Vector(name)

    def plus_one(self, vector: Vector) -> Vector:
        """See `Ops`."""
        return replace(vector, plus=vector.plus + 1.0)

    def embedding(self, token_ids: Tensor, weight: str) -> Tensor:
        """See `Ops`."""
        type_, form = self._checked("embedding", token_ids, weight), self.forms(weight)
        values, scales = self._stored(weight)
        if scales is None:
            return self._tensor(self.f.embedding(token_ids.handle, values), type_)
        rows = self.f.embedding_int8(token_ids.handle, values, scales, form, type_.dtype)
        return self._tensor(rows, type_)

    def rows(self, x: Tensor, index: Tensor) -> Tensor:
        """See `Ops`."""
        return self._tensor(self.f.embedding(index.handle, x.handle), self._checked("rows", x, index))

    def concat(self, a: Tensor, b: Tensor) -> Tensor:
        """See `Ops`."""
        return self._tensor(self.f.concat([a.handle, b.handle], 1), self._checked("concat", a, b))

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """See `Ops`."""
        return self._tensor(self.f.add(a.handle, b.handle), self._checked("add", a, b))

    def linear(self, x: Tensor, weight: str) -> Tensor:
        """See `Ops`."""
        type_ = self._checked("linear", x, weight)
        return self._tensor(self.f.matmul(x.handle, self._matrix(weight), transb=True), type_)

    def linear_fp32(self, x: Tensor, weight: str) -> Tensor:
        """See `Ops`."""
        type_ = self._checked("linear_fp32", x, weight)
        wide, matrix = (self.f.cast(value, "float32") for value in (x.handle, self._matrix(weight)))
        return self._tensor(self.f.matmul(wide, matrix, transb=True), type_)

    def bias(self, x: Tensor, vector: Vector) -> Tensor:
        """See `Ops`."""
        type_ = self._checked("bias", x, vector)
        return self._tensor(self.f.add(x.handle, self._vector(vector)), type_)

    def sigmoid(self, x: Tensor) -> Tensor:
        """See `Ops`."""
        return self._tensor(self.f.sigmoid(x.handle), self._checked("sigmoid", x))

    def swiglu(self, gate: Tensor, up: Tensor, limit: float) -> Tensor:
        """See `Ops`."""
        type_, f = self._checked("swiglu", gate, up, limit), self.f
        activated, scaled = f.silu(gate.handle, type_.dtype), up.handle
        if limit:
            high, low = (f.scalar(bound, self.forms.activation) for bound in (limit, -limit))
            activated = f.minimum(activated, high)
            scaled = f.maximum(f.minimum(scaled, high), low)
        return self._tensor(f.mul(activated, scaled), type_)

    def rms_norm(self, x: Tensor, gamma: Vector, eps: float) -> Tensor:
        """See `Ops`."""
        type_ = self._checked("rms_norm", x, gamma, eps)
        return self._tensor(self.f.rms_norm(x.handle, self._vector(gamma), eps, type_.dtype), type_)

    def gated_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor,
        q_gamma: Vector,
        k_gamma: Vector,
        eps: float,
        layer: LayerSpec,
    ) -> Tensor:
        """See `Ops`."""
        type_ = self._checked("gated_attention", q, k, v, gate, q_gamma, k_gamma, eps, layer)
        gammas = self._vector(q_gamma), self._vector(k_gamma)
        inputs = q.handle, k.handle, v.handle, gate.handle
        return self._tensor(self.plugins.gated_attention(self.f, inputs, gammas, eps, layer), type_)

    def sparse_moe(
        self,
        x: Tensor,
        selection: Tensor,
        weights: Tensor,
        experts: str,
        top_k: int,
        scale: float,
        limit: float,
    ) -> Tensor:
        """See `Ops`."""
        type_ = self._checked("sparse_moe", x, selection, weights, experts, top_k, scale, limit)
        inputs = x.handle, selection.handle, weights.handle
        return self._tensor(self.plugins.sparse_moe(self.f, inputs, experts, top_k, scale, limit), type_)

    def _checked(self, word: str, *arguments: object) -> Type:
        return checked(self.site(), self.forms, word, *arguments)

    def _matrix(self, name: str) -> ITensor:
        """A weight decoded, by an explicit dequantise layer: the pattern that compilers fuse."""
        if name not in self._decoded:
            values, scales = self._stored(name)
            if scales is not None:
                values = self.f.dequantize(values, scales, self.forms(name), self.forms.activation)
            self._decoded[name] = values
        return self._decoded[name]

    def _stored(self, name: str) -> tuple[ITensor, ITensor | None]:
        return self.weights.matrix(self.f, name, self.forms(name))

    def _vector(self, vector: Vector) -> ITensor:
        if vector.name not in self._decoded:
            self._decoded[vector.name] = self.weights.vector(self.f, vector, self.forms(vector.name))
        return self._decoded[vector.name]

    def _tensor(self, handle: ITensor, type_: Type) -> Tensor:
        found, width = handle.dtype, tuple(handle.shape)[1:]
        if found != self.f.dtype(type_.dtype) or width != ((type_.width,) if type_.width else ()):
            raise UnsupportedError(
                f"{self.site()}: TensorRT makes {found.name} {list(handle.shape)} of {type_}"
            )
        return Tensor(handle, type_)
