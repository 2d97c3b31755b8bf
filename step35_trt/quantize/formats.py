"""How a quantised parameter lies in a checkpoint: the one place that knows names, dtypes and packing.

A parameter `P.weight` of shape `[..., N, K]` (stacked experts have a leading axis E) is stored as

    coding       P.weight                           scales
    fp32, bf16   F32, BF16 [..., N, K]              none
    fp8-rows     F8_E4M3 [..., N, K]                P.weight_scale      F32 [..., N]
    fp8-blocks   F8_E4M3 [..., N, K]                P.weight_scale_inv  F32 [..., ceil(N / b), ceil(K / b)]
    int8         I8 [..., N, K]                     P.weight_scale      F16 [..., N, K / b]
    int4         U8 [..., ceil(N / 2), K]           P.weight_scale      F16 [..., N, K / b]

and every weight is `code * scale`, the product in fp32. An int4 byte holds two *output* features: row 2i in
its low nibble, row 2i + 1 in its high one, two's complement; the last high nibble of an odd N is 0.

fp8-blocks is the official FP8 checkpoint's layout (specification 4.2), with b = 128. The others are what
ModelOpt 0.47 exports: int4 as W4A16_AWQ (`export.quant_utils.pack_int4_in_uint8`), fp8-rows as
FP8_PER_CHANNEL_PER_TOKEN, int8 as W8A16 with groups. Two things differ, and unpacking does not see them: a
group's scale carries the sign of the group's largest value, which so uses the code -8 and makes the step an
eighth smaller; and factors of AWQ are folded into other weights, so there is no `pre_quant_scale`. Reading
takes scales of fp32 or bf16 as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import ml_dtypes
import numpy as np

from step35_trt.errors import CorruptInputError, UnsupportedError
from step35_trt.quantize.blocks import offset_codes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

Kind = Literal["fp32", "bf16", "fp8-rows", "fp8-blocks", "int8", "int4"]

DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
}
PLAIN = ("BF16", "F16", "F32")
E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)

# Gives a stored tensor by name, mapped.
Read = Callable[[str], "NDArray[np.generic]"]

# A stored tensor: its dtype as safetensors spells it, and its shape.
Entry = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Coding:
    """How one parameter is stored; `block` values share a scale, or squares of that edge (0: neither)."""

    kind: Kind
    block: int = 0

    def scale_name(self, name: str) -> str | None:
        """The tensor with the scales of parameter `name`."""
        if self.kind in ("fp32", "bf16"):
            return None
        return f"{name}_scale_inv" if self.kind == "fp8-blocks" else f"{name}_scale"

    def entries(self, name: str, shape: tuple[int, ...]) -> dict[str, Entry]:
        """The stored tensors of a parameter `[..., N, K]` (any shape where there is no scale)."""
        scales = self.scale_name(name)
        if scales is None:
            return {name: ("F32" if self.kind == "fp32" else "BF16", shape)}
        *stack, n, k = shape
        if self.kind == "fp8-rows":
            return {name: ("F8_E4M3", shape), scales: ("F32", (*stack, n))}
        if self.kind == "fp8-blocks":
            grid = (math.ceil(n / self.block), math.ceil(k / self.block))
            return {name: ("F8_E4M3", shape), scales: ("F32", (*stack, *grid))}
        scale = ("F16", (*stack, n, k // self.block))
        packed = ("U8", (*stack, math.ceil(n / 2), k)) if self.kind == "int4" else ("I8", shape)
        return {name: packed, scales: scale}


def detect(name: str, shape: tuple[int, ...], stored: Mapping[str, Entry], fp8_block: int | None) -> Coding:
    """How a parameter of the given shape is stored, from the tensors themselves.

    Args:
        name: The parameter.
        shape: Its shape in the model.
        stored: All tensors of the checkpoint.
        fp8_block: Edge of the FP8 blocks as the config declares it.

    Raises:
        CorruptInputError: codes and scales do not fit each other or the shape.
        UnsupportedError: a dtype, or a factor of the inputs, that is not read.
    """
    dtype, found = stored[name]
    if f"{name.removesuffix('.weight')}.pre_quant_scale" in stored:
        raise UnsupportedError(f"{name} has a pre_quant_scale, which this compiler does not read")
    scales = stored.get(f"{name}_scale")
    if dtype in PLAIN:
        if found != shape:
            raise CorruptInputError(f"{name} has shape {list(found)}, the config says {list(shape)}")
        return Coding("bf16" if dtype == "BF16" else "fp32")
    kind: Kind
    if dtype == "F8_E4M3":
        kind = "fp8-rows" if scales else "fp8-blocks"
        if kind == "fp8-blocks" and fp8_block is None:
            raise CorruptInputError(f"{name} is FP8 but config.json has no quantization_config for it")
    else:
        kind = "int4" if dtype == "U8" else "int8"
    if len(shape) == 1:
        raise UnsupportedError(f"{name} has dtype {dtype}, which this compiler does not read for a vector")
    block = (fp8_block or 0) if kind == "fp8-blocks" else 0
    if kind in ("int4", "int8"):
        groups = scales[1][-1] if scales and scales[1] else 0
        if not groups or shape[-1] % groups:
            raise CorruptInputError(f"{name} has dtype {dtype} and needs the scales of its groups")
        block = shape[-1] // groups
    coding = Coding(kind, block)
    for part, (want, size) in coding.entries(name, shape).items():
        has = stored.get(part)
        if has is None or has[1] != size or (part != name and has[0] not in PLAIN):
            raise CorruptInputError(f"{name} is {kind} and needs {part}, {want} {list(size)}")
    return coding


def decode(
    coding: Coding, name: str, shape: tuple[int, ...], stored: Read, rows: slice
) -> NDArray[np.float32]:
    """Values of a slice along the parameter's first axis.

    Args:
        coding: What `detect` found; not a plain one.
        name: The parameter.
        shape: Its shape in the model.
        stored: Gives a stored tensor by name, mapped.
        rows: With start and stop, step 1.
    """
    scale_name = coding.scale_name(name)
    assert scale_name is not None
    codes, scales = stored(name), stored(scale_name)
    if coding.kind == "int4":
        values = int4_codes(codes, shape, rows).astype(np.float32)
    elif coding.kind == "int8":
        values = codes[rows].astype(np.float32)
    else:
        values = E4M3[codes[rows].view(np.uint8)]
    b = coding.block
    if coding.kind == "fp8-blocks":
        if len(shape) == 2:
            factors = scales[np.arange(rows.start, rows.stop) // b]
        else:
            factors = scales[rows].repeat(b, axis=-2)[..., : shape[-2], :]
        values *= factors.astype(np.float32).repeat(b, axis=-1)[..., : shape[-1]]
        return values
    factors = scales[rows].astype(np.float32)[..., None]
    if coding.kind == "fp8-rows":
        values *= factors
        return values
    grouped = values.reshape(*values.shape[:-1], -1, b)
    grouped *= factors
    return values


def engine_codes(
    coding: Coding, name: str, shape: tuple[int, ...], stored: Read, rows: slice, block: int
) -> tuple[NDArray[np.uint8], NDArray[np.floating]]:
    """A slice's integer codes and scales in the form of `blocks.quantize_blocks`, for blocks of `block`.

    Nothing is rounded: where `block` is smaller than the coding's, blocks have the same scale.
    """
    packed, scale = stored(name), stored(f"{name}_scale")
    if coding.kind == "int4":
        codes = int4_codes(packed, shape, rows)
    else:
        codes = np.ascontiguousarray(packed[rows]).view(np.int8)
    scales: NDArray[np.floating] = scale[rows].astype(np.float16 if scale.dtype == np.float16 else np.float32)
    return offset_codes(codes, 4 if coding.kind == "int4" else 8), scales.repeat(coding.block // block, -1)


def int4_codes(packed: NDArray[np.generic], shape: tuple[int, ...], rows: slice) -> NDArray[np.int8]:
    """Codes -8 .. 7 of a slice along the first axis, `[..., N, K]`, from bytes of two rows each."""
    n = shape[-2]
    if len(shape) == 2:
        first = rows.start // 2
        part = packed[first : math.ceil(rows.stop / 2)]
        cut = slice(rows.start - 2 * first, rows.stop - 2 * first)
    else:
        part, cut = packed[rows], slice(0, n)
    signed = np.ascontiguousarray(part).view(np.int8)
    both = np.stack([signed << 4 >> 4, signed >> 4], axis=-2)
    return both.reshape(*part.shape[:-2], -1, part.shape[-1])[..., cut, :]
