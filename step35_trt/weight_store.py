"""The packed weights of a bundle: placed while the graphs are written, filled afterwards by streaming.

A dialect asks for a weight in the form its operators take and gets its place in a file. Nothing is read
until `WeightFile.write`, which holds one slice at a time; so the graphs, the sizes and the digests' inputs
are known before any byte moves, and each weight is stored once however many graphs use it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np

from step35_trt.errors import UnsupportedError
from step35_trt.parallel import in_order
from step35_trt.quantize import cpu_layout, native
from step35_trt.quantize.blocks import block_size
from step35_trt.weight_file import WeightFile, file_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from step35_trt.checkpoint import Checkpoint
    from step35_trt.quantize.recipe import Recipe
    from step35_trt.weight_file import Placed

SLICE_BYTES = 32 << 20  # fp32 bytes handled at once by a thread
THREADS = min(4, os.cpu_count() or 1)  # more would not fit the memory budget of a build
BITS = {"fp32": 32, "int8": 8, "int4": 4}

# How 4-bit weights lie: block after block as ONNX Runtime's operators take them, or in the tiles of ours.
Layout = Literal["blocks", "tiles"]

S = TypeVar("S", bound=np.generic)

# What `blocks.quantize_blocks` gives: codes and scales.
Codes = tuple["NDArray[np.uint8]", "NDArray[np.floating]"]


@dataclass(frozen=True)
class Matrix:
    """A weight `[..., N, K]` as an operator takes it.

    `bits` is 32 (fp32), 8 or 4; `scales` and `block` are there where it is quantised.
    """

    bits: int
    shape: tuple[int, ...]
    values: Placed
    scales: Placed | None = None
    block: int = 0


@dataclass(frozen=True)
class Experts:
    """Stacked experts; `up` holds gate and up rows, interleaved one by one or, in tiles, by sixteens."""

    up: Matrix
    down: Matrix


@dataclass
class WeightStore:
    """All packed weights of a bundle, by file. Asking twice for a weight gives the same place."""

    checkpoint: Checkpoint
    recipe: Recipe
    layout: Layout = "blocks"
    files: dict[str, WeightFile] = field(default_factory=dict)
    uncut: set[str] = field(default_factory=set)
    _vectors: dict[tuple[str, float], Placed] = field(default_factory=dict)
    _matrices: dict[tuple[str, int], Matrix] = field(default_factory=dict)
    _experts: dict[str, Experts] = field(default_factory=dict)

    def vector(self, name: str, plus: float) -> Placed:
        """A 1-D parameter in fp32 with `plus` added."""
        if (name, plus) not in self._vectors:
            shape = self.checkpoint.shape(name)
            stored = f"{name}+{plus:g}" if plus else name

            def chunks() -> Iterator[NDArray[np.generic]]:
                yield self.checkpoint.read(name) + np.float32(plus)

            self._vectors[name, plus] = self._file(name).place(stored, "float32", shape, chunks)
        return self._vectors[name, plus]

    def coding(self, name: str) -> tuple[int, int]:
        """Bits and block of a weight in the recipe's precision.

        A width that no block divides stays in fp32 and is remembered in `uncut`. Stacked experts have one
        block for both of their products, as their operators do.
        """
        rule = self.recipe.rule(name)
        shape = self.checkpoint.shape(name)
        block = block_size(rule.block, *(shape[1:] if len(shape) == 3 else shape[-1:]))
        if rule.precision not in BITS:
            raise UnsupportedError(
                f"recipe {self.recipe.name} stores {name} as {rule.precision}, which no CPU operator takes",
                "Give it to `quantize` or `build-engine --recipe`; a CPU engine has fp32, int8 and int4.",
            )
        if rule.precision == "fp32":
            return 32, 0
        if not block:
            self.uncut.add(name)
            return 32, 0
        return BITS[rule.precision], block

    def matrix(self, name: str, *, fp32: bool = False) -> Matrix:
        """A weight `[..., N, K]` in the recipe's precision, or in fp32."""
        bits, block = (32, 0) if fp32 else self.coding(name)
        if (name, bits) not in self._matrices:
            source = _Rows(self.checkpoint, name)
            self._matrices[name, bits] = self._place(name, name, source, bits, block)
        return self._matrices[name, bits]

    def experts(self, prefix: str, stretch: float) -> Experts:
        """The stacked experts under `prefix`.

        `stretch` multiplies the up rows and divides the down rows, which leaves an unclamped expert as it
        was (the clamp's reparametrisation, see `dialects.onnx_ort`).
        """
        if prefix not in self._experts:
            gate, up, down = (f"{prefix}.{part}_proj.weight" for part in ("gate", "up", "down"))
            bits, block = self.coding(up)
            tiles = self.layout == "tiles" and bits == 4
            sources = (
                _GateUp(self.checkpoint, gate, up, stretch, tiles),
                _Rows(self.checkpoint, down, 1 / stretch),
            )
            self._experts[prefix] = Experts(
                self._place(gate, f"{prefix}.gate_up", sources[0], bits, block),
                self._place(gate, f"{prefix}.down", sources[1], bits, block),
            )
        return self._experts[prefix]

    def _file(self, weight: str) -> WeightFile:
        name = file_name(weight)
        return self.files.setdefault(name, WeightFile(name))

    def _place(self, weight: str, stored: str, source: _Source, bits: int, block: int) -> Matrix:
        file, shape = self._file(weight), source.shape
        if bits == 32:
            parts = source.parts
            return Matrix(32, shape, file.place(stored, "float32", shape, lambda: map(source.read, parts)))
        tiles = self.layout == "tiles" and bits == 4
        pending: list[NDArray[np.floating]] = []

        def coded(part: slice) -> tuple[NDArray[np.uint8], NDArray[np.floating]]:
            own = source.codes(part, bits, block)
            packed, factors = own or native.quantize_blocks(stored, source.read(part), bits, block)
            return cpu_layout.tile(packed, factors) if tiles else (packed, factors.astype(np.float32))

        def codes() -> Iterator[NDArray[np.generic]]:
            pending.clear()
            for packed, factors in in_order(coded, source.parts, THREADS):
                pending.append(factors)
                yield packed

        def scales() -> Iterator[NDArray[np.generic]]:
            # The codes were written just before: their scales are at hand.
            yield from pending
            pending.clear()

        if tiles:
            value_shape, scale_shape = cpu_layout.tiled_shapes(shape, block)
        else:
            blocks = shape[-1] // block
            # MatMulNBits counts blocks in a dimension of their own; the stacked and gathered forms do not.
            flat = len(shape) == 3 or bits == 8
            packed_row = (shape[-1] * bits // 8,) if flat else (blocks, block * bits // 8)
            value_shape, scale_shape = (*shape[:-1], *packed_row), (*shape[:-1], blocks)
        values = file.place(f"{stored}.int{bits}", "uint8", value_shape, codes)
        placed = file.place(f"{stored}.scales", "float16" if tiles else "float32", scale_shape, scales)
        return Matrix(bits, shape, values, placed, block)


@dataclass(frozen=True)
class _Rows:
    """A weight as it is, in slices of bounded size along its first axis."""

    checkpoint: Checkpoint
    name: str
    factor: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.checkpoint.shape(self.name)

    @property
    def parts(self) -> list[slice]:
        shape = self.shape
        step = max(1, SLICE_BYTES // (4 * int(np.prod(shape[1:]))))
        if len(shape) == 2:
            step = max(cpu_layout.TILE, step // cpu_layout.TILE * cpu_layout.TILE)  # no slice cuts a tile
        return [slice(start, start + step) for start in range(0, shape[0], step)]

    def read(self, part: slice) -> NDArray[np.float32]:
        weight = self.checkpoint.read(self.name, part)
        return weight if self.factor == 1 else weight * np.float32(self.factor)

    def codes(self, part: slice, bits: int, block: int) -> Codes | None:
        own = self.checkpoint.codes(self.name, part, bits, block)
        return own and _scaled(own, self.factor)


@dataclass(frozen=True)
class _GateUp:
    """Gate and up rows of each expert, interleaved one by one or tile by tile; a slice is one expert."""

    checkpoint: Checkpoint
    gate: str
    up: str
    factor: float
    tiles: bool

    @property
    def shape(self) -> tuple[int, ...]:
        experts, width, features = self.checkpoint.shape(self.gate)
        return (experts, 2 * width, features)

    @property
    def parts(self) -> list[slice]:
        return [slice(expert, expert + 1) for expert in range(self.shape[0])]

    def read(self, part: slice) -> NDArray[np.float32]:
        gate, up = self.checkpoint.read(self.gate, part), self.checkpoint.read(self.up, part)
        if self.factor != 1:
            up *= np.float32(self.factor)
        return self._together(gate, up)

    def codes(self, part: slice, bits: int, block: int) -> Codes | None:
        gate = self.checkpoint.codes(self.gate, part, bits, block)
        up = self.checkpoint.codes(self.up, part, bits, block)
        if gate is None or up is None:
            return None
        up = _scaled(up, self.factor)
        return self._together(gate[0], up[0]), self._together(gate[1].astype(up[1].dtype), up[1])

    def _together(self, gate: NDArray[S], up: NDArray[S]) -> NDArray[S]:
        if self.tiles:
            return cpu_layout.interleave_gate_up(gate, up)
        return np.stack([gate, up], axis=2).reshape(1, -1, gate.shape[-1])


def _scaled(codes: Codes, factor: float) -> Codes:
    """Codes whose weights are multiplied by a factor."""
    return codes if factor == 1 else (codes[0], codes[1].astype(np.float32) * np.float32(factor))


_Source = _Rows | _GateUp
