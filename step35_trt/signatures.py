"""The types of the vocabulary: what each operation takes and what it gives, declared once for all compilers.

A compiler of dense algebra is quick to accept operands that do not fit and to fail much later, far from the
cause. So types are checked while the model is written, and a mismatch names the module and the line of
`model.py` that wrote it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from step35_trt import model
from step35_trt.errors import UnsupportedError

if TYPE_CHECKING:
    from step35_trt.config import LayerSpec
    from step35_trt.weight_forms import Dtype, Forms

# What the leading dimension counts: packed tokens, or the rows chosen among them.
Rows = Literal["tokens", "rows"]


@dataclass(frozen=True)
class Type:
    """`[rows, width]` of `dtype`; width 0 stands for `[rows]`."""

    dtype: Dtype
    width: int
    rows: Rows

    def __str__(self) -> str:
        """As an error shows it."""
        return f"{self.dtype} [{self.rows}{f', {self.width}' if self.width else ''}]"


class Typed(Protocol):
    """A value that knows its type."""

    @property
    def type(self) -> Type:
        """Its type."""
        ...


@dataclass(frozen=True)
class Vector:
    """A vector parameter, fp32, with `plus` added: arithmetic on it is folded when weights are bound."""

    name: str
    plus: float = 0.0


@dataclass(frozen=True)
class Site:
    """Where the model wrote an operation: the module's path in the checkpoint and the line of `model.py`."""

    path: str
    line: int

    def __str__(self) -> str:
        """As an error shows it."""
        return f"{self.path} (model.py:{self.line})"


MODEL_FILE = str(Path(model.__file__))


def call_site() -> Site:
    """The innermost line of `model.py` on the stack, and the module it works for.

    The functions there keep their module's path in a local named `p`; those of the whole model have none.
    """
    frame, line = sys._getframe(), 0
    while frame is not None:
        if frame.f_code.co_filename == MODEL_FILE:
            line = line or frame.f_lineno
            if isinstance(path := frame.f_locals.get("p"), str):
                return Site(path, line)
        if frame.f_back is None:
            break
        frame = frame.f_back
    return Site("model", line)


@dataclass(frozen=True)
class Signatures:
    """One method for each operation: checks the operands, returns the result's type.

    Raises:
        UnsupportedError: from every method, where an operand's type does not fit.
    """

    forms: Forms

    def embedding(self, token_ids: Typed, weight: str) -> Type:
        """See `Ops`."""
        _expect("token_ids", token_ids.type, Type("int64", 0, "tokens"))
        return Type(self.forms.activation, self.forms(weight).shape[1], "tokens")

    def rows(self, x: Typed, index: Typed) -> Type:
        """See `Ops`."""
        _expect("index", index.type, Type("int64", 0, "rows"))
        _expect("x", x.type, Type(x.type.dtype, x.type.width, "tokens"))
        return Type(x.type.dtype, x.type.width, "rows")

    def concat(self, a: Typed, b: Typed) -> Type:
        """See `Ops`."""
        _expect("b", b.type, Type(a.type.dtype, b.type.width, a.type.rows))
        return Type(a.type.dtype, a.type.width + b.type.width, a.type.rows)

    def add(self, a: Typed, b: Typed) -> Type:
        """See `Ops`."""
        _expect("b", b.type, a.type)
        return a.type

    def linear(self, x: Typed, weight: str) -> Type:
        """See `Ops`."""
        out, features = self.forms(weight).shape
        _expect(f"the operand of {weight}", x.type, Type(self.forms.activation, features, x.type.rows))
        return Type(self.forms.activation, out, x.type.rows)

    def linear_fp32(self, x: Typed, weight: str) -> Type:
        """See `Ops`."""
        return Type("float32", self.linear(x, weight).width, x.type.rows)

    def bias(self, x: Typed, vector: Vector) -> Type:
        """See `Ops`."""
        _expect("x", x.type, Type("float32", self.forms(vector.name).shape[0], x.type.rows))
        return x.type

    def sigmoid(self, x: Typed) -> Type:
        """See `Ops`."""
        return x.type

    def swiglu(self, gate: Typed, up: Typed, limit: float) -> Type:
        """See `Ops`."""
        _expect("up", up.type, gate.type)
        return gate.type

    def rms_norm(self, x: Typed, gamma: Vector, eps: float) -> Type:
        """See `Ops`."""
        want = Type(self.forms.activation, self.forms(gamma.name).shape[0], x.type.rows)
        _expect(f"the operand of {gamma.name}", x.type, want)
        return x.type

    def gated_attention(
        self,
        q: Typed,
        k: Typed,
        v: Typed,
        gate: Typed,
        q_gamma: Vector,
        k_gamma: Vector,
        eps: float,
        layer: LayerSpec,
    ) -> Type:
        """See `Ops`."""
        wide, narrow = layer.query_heads * layer.head_dim, layer.kv_heads * layer.head_dim
        operands = (("q", q, wide), ("k", k, narrow), ("v", v, narrow), ("gate", gate, layer.query_heads))
        for name, value, width in operands:
            _expect(name, value.type, Type(self.forms.activation, width, "tokens"))
        return q.type

    def sparse_moe(
        self,
        x: Typed,
        selection: Typed,
        weights: Typed,
        experts: str,
        top_k: int,
        scale: float,
        limit: float,
    ) -> Type:
        """See `Ops`."""
        count, features = self.forms(f"{experts}.gate.weight").shape
        _expect("x", x.type, Type(self.forms.activation, features, "tokens"))
        for name, value in (("selection", selection), ("weights", weights)):
            _expect(name, value.type, Type("float32", count, "tokens"))
        return x.type

    def all_reduce(self, x: Typed) -> Type:
        """The sum over ranks, on every rank."""
        return x.type

    def all_gather(self, x: Typed, ranks: int) -> Type:
        """The ranks' features side by side, on every rank."""
        return Type(x.type.dtype, x.type.width * ranks, x.type.rows)


def _expect(name: str, found: Type, wanted: Type) -> None:
    if found != wanted:
        raise UnsupportedError(f"{name} is {found}, {wanted} is needed")
