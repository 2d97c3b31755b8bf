"""Weights as a GPU bundle stores them: packed once, in the forms that engines and kernels take.

Dense weights lie as `weight_forms` says, so that an engine's input is bound to the mapped file; experts lie
as `plugins/sparse_moe/pack.py` says. Vectors are stored as they are: what is added to them is folded when
they are bound. Where ranks share the model, each rank's share is packed as a tensor of its own, so that it
too is loaded by mapping a file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from step35_trt.gpu_forms import experts_of
from step35_trt.kernels import plugin
from step35_trt.parallel import in_order
from step35_trt.program import WeightPlace
from step35_trt.sharing import ALONE, Sharing
from step35_trt.weight_file import WeightFile, file_name, mapped
from step35_trt.weight_forms import NUMPY, Forms, Packed, packed_weight

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from step35_trt.checkpoint import Checkpoint
    from step35_trt.program import ExpertFormat
    from step35_trt.weight_forms import WeightForm

SUFFIX = ".safetensors"
THREADS = 2
PART = 4 << 20  # elements of a matrix that are in memory at a time
ROW_BLOCK = 128  # rows that share scales in any coding: parts end between them
T = TypeVar("T")


@dataclass(frozen=True)
class Packing:
    """A checkpoint's weights as the ranks of an engine store them.

    Attributes:
        checkpoint: Where they come from; in the codes of `forms`.
        forms: Of the whole model.
        experts: Format of each layer's experts by prefix.
        sharing: Which part of a weight a rank has.
    """

    checkpoint: Checkpoint
    forms: Forms
    experts: Mapping[str, ExpertFormat]
    sharing: Sharing

    def rows(self, name: str, rank: int, part: slice) -> Packed:
        """Some rows of a rank's share of a matrix; rows cut no block. Of a vector all."""
        form, axis = self.forms(name), self.sharing.axis(name)
        if len(form.shape) == 1:
            return packed_weight(self.checkpoint, name, form)
        first = rank * (form.shape[0] // self.sharing.ranks) if axis == "rows" else 0
        packed = packed_weight(self.checkpoint, name, form, slice(first + part.start, first + part.stop))
        return self.sharing.cut(packed, name, rank) if axis == "columns" else packed

    def expert(self, name: str, rank: int, index: int) -> Packed:
        """A rank's share of one matrix of a stack, as the kernels take it."""
        form = self.forms(name)
        if self.experts.get(experts_of(name)) != "int4":
            packed = packed_weight(self.checkpoint, name, form, index)
            return self.sharing.cut(packed, name, rank)
        # Two rows a byte, of which no cut takes one alone: kernels want a multiple of 128 both ways.
        rows = np.asarray(self.checkpoint.stored(name)[index])
        scales = np.asarray(self.checkpoint.stored(f"{name}_scale")[index])
        cut = self.sharing.cut(Packed(rows, scales), name, rank)
        assert cut.scales is not None
        return Packed(*plugin.load("sparse_moe", "pack").repack_int4(cut.values, cut.scales))


@dataclass
class GpuWeights:
    """All weights of a bundle, laid out by file before any byte is read.

    What every rank holds is stored once; what one rank holds alone lies in files of its own.

    Attributes:
        forms: Of the whole model.
        experts: The kernels' format of each layer's experts by prefix; others are stored in their forms.
        sharing: Which part of a weight a rank has.
        packing: Gives the bytes when files are written; None where only sizes are asked for.
        files: To be written.
        places: Of every tensor that all ranks hold.
        shares: Of every rank's own tensors.
    """

    forms: Forms
    experts: Mapping[str, ExpertFormat]
    sharing: Sharing
    packing: Packing | None
    files: dict[str, WeightFile] = field(default_factory=dict)
    places: dict[str, WeightPlace] = field(default_factory=dict)
    shares: tuple[dict[str, WeightPlace], ...] = ()

    def __post_init__(self) -> None:
        ranks = range(self.sharing.ranks)
        self.shares = tuple({} for _ in ranks)
        own = self.sharing.share(self.forms)
        for name, shape in own.shapes.items():
            for rank in (None,) if self.sharing.axis(name) is None else ranks:
                if len(shape) == 3:
                    self._place_experts(name, own, rank)
                else:
                    self._place_dense(name, own(name), rank)

    def _place_dense(self, name: str, form: WeightForm, rank: int | None) -> None:
        rows = form.shape[0]
        step = rows
        if len(form.shape) == 2:
            step = max(1, PART // form.shape[1] // ROW_BLOCK) * ROW_BLOCK
        parts = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

        def pack(part: slice) -> Packed:
            assert self.packing is not None
            return self.packing.rows(name, rank or 0, part)

        self._place(name, rank, *_tensors(form), pack, parts)

    def _place_experts(self, name: str, own: Forms, rank: int | None) -> None:
        kind, (count, n, k) = self.experts.get(experts_of(name)), own.shapes[name]
        if kind is None:
            (dtype, values), (scale_dtype, scales) = _tensors(own(name))
        else:
            values, scales = plugin.load("sparse_moe", "pack").shapes(kind, n, k)
            types = {"bf16": ("bfloat16", ""), "int4": ("int16", "int32")}
            dtype, scale_dtype = types.get(kind, ("float8_e4m3fn", "float32"))

        def pack(expert: int) -> Packed:
            assert self.packing is not None
            return self.packing.expert(name, rank or 0, expert)

        held = self.sharing.held(name, self.forms.shapes[name][0], rank or 0)
        types_of = (dtype, (count, *values)), (scale_dtype, (count, *scales))
        self._place(name, rank, *types_of, pack, held)

    def _place(
        self,
        name: str,
        rank: int | None,
        values: tuple[str, tuple[int, ...]],
        scales: tuple[str, tuple[int, ...]],
        pack: Callable[[T], Packed],
        parts: Sequence[T],
    ) -> None:
        """Reserve room for values and, where there is a dtype for them, scales; filled part by part."""
        pending: list[NDArray[np.generic]] = []

        def chunks() -> Iterator[NDArray[np.generic]]:
            pending.clear()
            for packed in in_order(pack, parts, THREADS):
                if packed.scales is not None:
                    pending.append(packed.scales)
                yield packed.values

        def scale_chunks() -> Iterator[NDArray[np.generic]]:
            yield from pending
            pending.clear()

        self._reserve(name, name, rank, *values, chunks)
        if scales[0]:
            self._reserve(name, f"{name}.scales", rank, *scales, scale_chunks)

    def _reserve(
        self,
        weight: str,
        name: str,
        rank: int | None,
        dtype: str,
        shape: tuple[int, ...],
        chunks: Callable[[], Iterator[NDArray[np.generic]]],
    ) -> None:
        file, places = file_name(weight), self.places
        if rank is not None:
            file = f"{file.removesuffix(SUFFIX)}.rank-{rank}{SUFFIX}"
            places = self.shares[rank]
        placed = self.files.setdefault(file, WeightFile(file)).place(name, dtype, shape, chunks)
        places[name] = WeightPlace(file=file, offset=placed.offset, dtype=dtype, shape=shape)


@dataclass(frozen=True)
class StoredWeights:
    """What a rank has of a bundle's weights, mapped.

    Attributes:
        directory: The bundle.
        places: Of all that the rank holds (`SteppedProgram.places`).
        experts: Format of each layer's experts by prefix.
        sharing: Which of the experts those are.
        rank: From 0.
    """

    directory: Path
    places: Mapping[str, WeightPlace]
    experts: Mapping[str, ExpertFormat]
    sharing: Sharing = ALONE
    rank: int = 0

    def read(self, name: str, form: WeightForm, expert: int | None) -> Packed:
        """See `interpret.weights.Read`; what kernels take is brought into the form of one matrix."""
        values = self.mapped(name)
        scales = self.mapped(f"{name}.scales") if f"{name}.scales" in self.places else None
        if expert is None:
            return Packed(values, scales)
        local = expert - self.first(name)
        assert 0 <= local < len(values), f"{name}: rank {self.rank} has no expert {expert}"
        one, factors = values[local], None if scales is None else scales[local]
        if self.experts.get(experts_of(name)) != "int4":
            return Packed(one, factors)
        codes, halves = plugin.load("sparse_moe", "pack").unpack_int4(one, factors)
        # From an offset of half the range to two's complement.
        return Packed((codes[:, 0::2] | codes[:, 1::2] << 4) ^ 0x88, halves)

    def first(self, name: str) -> int:
        """Which expert is the first in the stack of a projection."""
        held = self.places[name].shape[0]
        return self.rank * held if self.sharing.axis(name) == "experts" else 0

    def mapped(self, name: str) -> NDArray[np.generic]:
        """A tensor, read-only, of the file itself."""
        place = self.places[name]
        dtype = NUMPY.get(place.dtype, np.dtype(place.dtype))
        return mapped(self.directory / place.file, dtype, place.offset, place.shape)


def _tensors(form: WeightForm) -> tuple[tuple[str, tuple[int, ...]], tuple[str, tuple[int, ...]]]:
    """Type and shape of a form's values as they are stored, and of its scales; "" where it has none."""
    scales = form.scale_dtype or "", form.scale_shape
    if form.dtype == "int4":
        return ("uint8", (*form.shape[:-1], form.shape[-1] // 2)), scales
    return (form.dtype, form.shape), scales
