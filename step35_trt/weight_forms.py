"""How a weight reaches a compiled segment: its stored type, its scales, and what they decode to.

A recipe or a quantised checkpoint says how a weight is coded (`quantize.formats`); this says how TensorRT
wants the same codes. Two int4 values of a row share a byte, the first in the low half, in two's complement.
Scales multiply: `weight = value * scale`, rounded once to the type that is computed in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Literal

import ml_dtypes
import numpy as np

from step35_trt.errors import UnsupportedError
from step35_trt.quantize.blocks import block_size, quantize_blocks
from step35_trt.quantize.formats import Coding, int4_codes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from step35_trt.checkpoint import Checkpoint
    from step35_trt.quantize.recipe import Recipe

Dtype = Literal["bfloat16", "float32", "float8_e4m3fn", "int8", "int4", "int64"]
Activation = Literal["bfloat16", "float32"]

NUMPY: dict[str, np.dtype[np.generic]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "int8": np.dtype(np.int8),
    "int64": np.dtype(np.int64),
}
BITS = {"bfloat16": 16, "float32": 32, "float8_e4m3fn": 8, "int8": 8, "int4": 4, "int64": 64}
# What packed codes lie in.
BITS |= {"uint8": 8, "int16": 16, "int32": 32}
FP8_MAX = 448.0
PLAIN = ("fp32", "bf16")
INTEGERS = {"int8": 8, "int4": 4}
ROUTER = ".moe.gate.weight"  # stays fp32 in every recipe (specification 2.8)
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class WeightForm:
    """A weight as a segment takes it.

    Attributes:
        dtype: Of the values.
        shape: Of the values, as decoded: `[N, K]`, or `[n]` for a vector.
        scale_dtype: None where nothing is scaled.
        scale_shape: `[N]` for a scale a row, else `[ceil(N / rows), ceil(K / columns)]`.
        block: Rows and columns that share a scale; those at an edge may be fewer.
    """

    dtype: Dtype
    shape: tuple[int, ...]
    scale_dtype: Activation | None = None
    scale_shape: tuple[int, ...] = ()
    block: tuple[int, int] = (0, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        scales = math.prod(self.scale_shape) * BITS[self.scale_dtype] // 8 if self.scale_dtype else 0
        return math.prod(self.shape) * BITS[self.dtype] // 8 + scales

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's values and scales, which is what an embedding reads for a token."""
        return self.nbytes // self.shape[0]


@dataclass(frozen=True)
class Packed:
    """A weight's values (int4: uint8 `[N, K / 2]`) and scales."""

    values: NDArray[np.generic]
    scales: NDArray[np.generic] | None = None


@dataclass(frozen=True)
class Forms:
    """The form of each weight of a model.

    Attributes:
        shapes: By checkpoint name.
        coding: How a matrix is coded. What is not quantised is stored in the type that is computed in,
            whatever plain type the coding names; vectors and the router are fp32.
        activation: What dense algebra is computed in.
    """

    shapes: Mapping[str, tuple[int, ...]]
    coding: Callable[[str], Coding]
    activation: Activation

    @classmethod
    def of(cls, recipe: Recipe, shapes: Mapping[str, tuple[int, ...]]) -> Forms:
        """The forms of a recipe."""
        activation: Activation = "float32" if recipe.activations == "fp32" else "bfloat16"
        return cls(shapes, cache(lambda name: recipe.coding(name, shapes[name])), activation)

    def __call__(self, name: str) -> WeightForm:
        """The form of a vector, a matrix, or of one expert's matrix where experts are stacked.

        Raises:
            UnsupportedError: the model has no such weight, or its coding has no spelling here.
        """
        if name not in self.shapes:
            raise UnsupportedError(f"the model has no weight {name}")
        shape, coding = self.shapes[name], self.coding(name)
        if len(shape) == 1 or name.endswith(ROUTER):
            return WeightForm("float32", shape)
        rows, columns = matrix = shape[-2:]
        # The compiler gathers rows of int8 and of plain types only, and has no product with such int8.
        if coding.kind == "int8" and name == EMBEDDING:
            return WeightForm("int8", matrix, "float32", (rows, columns // coding.block), (1, coding.block))
        if coding.kind not in PLAIN and (coding.kind == "int8" or name == EMBEDDING):
            raise UnsupportedError(f"{name} is coded in {coding.kind}, in which TensorRT cannot use it")
        if coding.kind == "fp8-rows":
            return WeightForm("float8_e4m3fn", matrix, "float32", (rows,), (1, columns))
        edge = coding.block
        if coding.kind == "fp8-blocks":
            grid = (math.ceil(rows / edge), math.ceil(columns / edge))
            return WeightForm("float8_e4m3fn", matrix, "float32", grid, (edge, edge))
        if coding.kind == "int4" and (block := block_size(edge, columns)):
            # The compiler has a rule only for scales of the type that is computed in.
            return WeightForm("int4", matrix, self.activation, (rows, columns // block), (1, block))
        return WeightForm(self.activation, matrix)


def packed_weight(
    checkpoint: Checkpoint, name: str, form: WeightForm, part: int | slice | None = None
) -> Packed:
    """A weight of a checkpoint in a form: its own codes where they fit, else rounded to nearest.

    Args:
        checkpoint: Where it lies.
        name: Of the parameter.
        form: Of the whole matrix or vector.
        part: Which matrix of a stacked parameter, or which rows of a matrix; rows cut no block.

    Raises:
        CorruptInputError: the weight is damaged.
    """
    coding, index = checkpoint.codings[name], ... if part is None else part
    if isinstance(part, slice):
        form = of_rows(form, part)
    scale_name = coding.scale_name(name)
    if (
        scale_name is None
        and form.scale_dtype is None
        and (own := checkpoint.stored(name)).dtype == NUMPY[form.dtype]
    ):
        return Packed(np.asarray(own[index]))
    if scale_name is None or form.scale_dtype is None or not same_codes(coding, form):
        return pack(checkpoint.read(name, part), form)
    blocks = index
    if isinstance(index, slice):
        blocks = slice(index.start // form.block[0], math.ceil(index.stop / form.block[0]))
    scales = np.asarray(checkpoint.stored(scale_name)[blocks]).astype(NUMPY[form.scale_dtype])
    stored = checkpoint.stored(name)
    if form.dtype != "int4":
        return Packed(np.asarray(stored[index]), scales)
    shape = checkpoint.shape(name)
    rows = slice(part, part + 1) if isinstance(part, int) else part or slice(0, shape[0])
    codes = int4_codes(stored, shape, rows).reshape(form.shape).view(np.uint8)
    return Packed(codes[:, 0::2] & 15 | codes[:, 1::2] << 4, scales)


def of_rows(form: WeightForm, rows: slice) -> WeightForm:
    """The form of some rows of a matrix."""
    count = rows.stop - rows.start
    scales = form.scale_shape
    if scales:
        scales = (math.ceil(count / form.block[0]), *scales[1:])
    return replace(form, shape=(count, *form.shape[1:]), scale_shape=scales)


def same_codes(coding: Coding, form: WeightForm) -> bool:
    """Whether the checkpoint's codes and scales are the form's."""
    if coding.kind in INTEGERS:
        return (coding.kind, (1, coding.block)) == (form.dtype, form.block)
    square = (coding.block, coding.block) if coding.kind == "fp8-blocks" else (1, form.shape[1])
    return ("float8_e4m3fn", square) == (form.dtype, form.block)


def pack(weight: NDArray[np.float32], form: WeightForm) -> Packed:
    """Round to nearest; a block's largest magnitude is exact."""
    if form.scale_dtype is None:
        return Packed(weight.astype(NUMPY[form.dtype]))
    rows, columns = form.block
    if bits := INTEGERS.get(form.dtype):
        codes, factors = quantize_blocks(weight, bits, columns)
        # From an offset of half the range to two's complement.
        signed = codes ^ 0x88 if bits == 4 else (codes ^ 0x80).view(np.int8)
        return Packed(signed, factors.astype(NUMPY[form.scale_dtype]))
    whole = np.pad(weight, [(0, -n % edge) for n, edge in zip(weight.shape, form.block, strict=True)])
    blocks = np.abs(whole).reshape(whole.shape[0] // rows, rows, whole.shape[1] // columns, columns)
    scales = (blocks.max((1, 3)) / np.float32(FP8_MAX)).reshape(form.scale_shape)
    spread = _spread(scales, form)
    scaled = np.divide(weight, spread, out=np.zeros_like(weight), where=spread != 0)
    return Packed(scaled.astype(NUMPY[form.dtype]), scales)


def unpack(packed: Packed, form: WeightForm) -> NDArray[np.float32]:
    """The decoded weight before it is rounded to the type that is computed in."""
    values = packed.values
    if form.dtype == "int4":
        codes = values.view(np.int8)
        values = np.stack([codes << 4 >> 4, codes >> 4], -1).reshape(form.shape)
    wide = values.astype(np.float32)
    if packed.scales is None:
        return wide
    return wide * _spread(packed.scales.astype(np.float32), form)


def _spread(scales: NDArray[np.float32], form: WeightForm) -> NDArray[np.float32]:
    """The scale of each value."""
    rows, columns = form.block
    grid = scales.reshape(math.ceil(form.shape[0] / rows), -1)
    return grid.repeat(rows, 0)[: form.shape[0]].repeat(columns, 1)[:, : form.shape[1]]
