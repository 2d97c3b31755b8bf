"""Weights as a GPU bundle stores them: packed once, in the forms that engines and kernels take.

Dense weights lie as `weight_forms` says, so that an engine's input is bound to the mapped file; experts lie
as `plugins/sparse_moe/pack.py` says. Vectors are stored as they are: what is added to them is folded when
they are bound.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from step35_trt.checkpoint import EXPERT_PROJECTIONS, expected_tensors
from step35_trt.errors import UnsupportedError
from step35_trt.kernels import plugin
from step35_trt.parallel import in_order
from step35_trt.program import WeightPlace
from step35_trt.quantize.formats import Coding
from step35_trt.weight_file import WeightFile, file_name
from step35_trt.weight_forms import NUMPY, Forms, Packed, packed_weight, same_codes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from step35_trt.checkpoint import Checkpoint
    from step35_trt.config import Step35Config
    from step35_trt.program import ExpertFormat
    from step35_trt.quantize.recipe import Recipe
    from step35_trt.weight_forms import WeightForm

THREADS = 2
PART = 4 << 20  # elements of a matrix that are in memory at a time
ROW_BLOCK = 128  # rows that share scales in any coding: parts end between them
GROUP = 128  # values of a row that share a scale where kernels take int4
FORMATS: dict[Coding, ExpertFormat] = {
    Coding("int4", GROUP): "int4",
    Coding("fp8-rows"): "fp8_channel",
    Coding("fp8-blocks", 128): "fp8_block",
}


def expert_format(codings: Sequence[Coding]) -> ExpertFormat:
    """The kernels' format of experts whose projections are so coded; bf16 where they have none for it."""
    found = {FORMATS.get(coding, "bf16") for coding in codings}
    return found.pop() if len(found) == 1 else "bf16"


def deployed_forms(recipe: Recipe, config: Step35Config) -> tuple[Forms, dict[str, ExpertFormat]]:
    """The forms of a recipe, and the format of each layer's experts.

    Raises:
        UnsupportedError: the recipe computes in fp32, for which there are no GPU kernels.
    """
    if recipe.activations == "fp32":
        raise UnsupportedError(
            f"recipe {recipe.name} computes in fp32, and the GPU kernels take bf16 activations",
            "Name a recipe such as bf16 or int4-awq in the engine.",
        )
    shapes = expected_tensors(config)
    experts: dict[str, ExpertFormat] = {}
    for layer in config.layers:
        if layer.moe:
            prefix = f"{layer.prefix}.moe"
            names = [f"{prefix}.{part}.weight" for part in EXPERT_PROJECTIONS]
            experts[prefix] = expert_format([recipe.coding(name, shapes[name]) for name in names])

    def coding(name: str) -> Coding:
        plain = len(shapes[name]) == 3 and experts[_experts_of(name)] == "bf16"
        return Coding("bf16") if plain else recipe.coding(name, shapes[name])

    base = Forms.of(recipe, shapes)
    return replace(base, coding=coding), experts


def not_quantised(checkpoint: Checkpoint, forms: Forms) -> str | None:
    """A weight that the checkpoint has not in the codes of its form, if there is one."""
    for name in forms.shapes:
        form = forms(name)
        if form.scale_dtype is not None and not same_codes(checkpoint.codings[name], form):
            return name
    return None


def as_kernels_scale(checkpoint: Checkpoint) -> Callable[[str, WeightForm, int | None], Packed]:
    """A checkpoint's weights in their forms; kernels multiply experts by scales as they are stored."""

    def read(name: str, form: WeightForm, expert: int | None) -> Packed:
        exact = expert is not None and form.dtype == "int4"
        return packed_weight(
            checkpoint, name, replace(form, scale_dtype="float32") if exact else form, expert
        )

    return read


@dataclass
class GpuWeights:
    """All weights of a bundle, laid out by file before any byte is read.

    Attributes:
        checkpoint: Where they come from; in the codes of `forms`.
        forms: Of the whole model.
        experts: Format of each layer's experts by prefix.
        files: To be written.
        places: Of every tensor.
    """

    checkpoint: Checkpoint
    forms: Forms
    experts: Mapping[str, ExpertFormat]
    files: dict[str, WeightFile] = field(default_factory=dict)
    places: dict[str, WeightPlace] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, shape in self.forms.shapes.items():
            if len(shape) == 3:
                self._place_experts(name, shape)
            else:
                self._place_dense(name)

    def _place_dense(self, name: str) -> None:
        form = self.forms(name)
        packed = (*form.shape[:-1], form.shape[-1] // 2) if form.dtype == "int4" else form.shape
        dtype = "uint8" if form.dtype == "int4" else form.dtype
        rows = form.shape[0]
        step = rows
        if len(form.shape) == 2:
            step = max(1, PART // form.shape[1] // ROW_BLOCK) * ROW_BLOCK
        parts = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

        def pack(part: slice) -> Packed:
            return packed_weight(self.checkpoint, name, form, part if len(form.shape) == 2 else None)

        self._place(name, (dtype, packed), (form.scale_dtype or "", form.scale_shape), pack, parts)

    def _place_experts(self, name: str, shape: tuple[int, ...]) -> None:
        packing = plugin.load("sparse_moe", "pack")
        kind, (count, n, k) = self.experts[_experts_of(name)], shape
        values, scales = packing.shapes(kind, n, k)
        types = {"bf16": ("bfloat16", ""), "int4": ("int16", "int32")}
        dtype, scale_dtype = types.get(kind, ("float8_e4m3fn", "float32"))

        def pack(part: slice) -> Packed:
            if kind != "int4":
                return packed_weight(self.checkpoint, name, self.forms(name), part.start)
            own = self.checkpoint.codes(name, part, 4, GROUP)
            assert own is not None
            both, factors = own[0][0], own[1][0]
            words, pairs = packing.pack_int4(np.stack([both & 15, both >> 4], -1).reshape(n, k), factors)
            return Packed(words, pairs)

        parts = [slice(i, i + 1) for i in range(count)]
        self._place(name, (dtype, (count, *values)), (scale_dtype, (count, *scales)), pack, parts)

    def _place(
        self,
        name: str,
        values: tuple[str, tuple[int, ...]],
        scales: tuple[str, tuple[int, ...]],
        pack: Callable[[slice], Packed],
        parts: Sequence[slice],
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

        self._reserve(name, *values, chunks)
        if scales[0]:
            self._reserve(f"{name}.scales", *scales, scale_chunks)

    def _reserve(
        self,
        name: str,
        dtype: str,
        shape: tuple[int, ...],
        chunks: Callable[[], Iterator[NDArray[np.generic]]],
    ) -> None:
        file = file_name(name)
        placed = self.files.setdefault(file, WeightFile(file)).place(name, dtype, shape, chunks)
        self.places[name] = WeightPlace(file=file, offset=placed.offset, dtype=dtype, shape=shape)


@dataclass(frozen=True)
class StoredWeights:
    """A bundle's weights, mapped."""

    directory: Path
    places: Mapping[str, WeightPlace]
    experts: Mapping[str, ExpertFormat]

    def read(self, name: str, form: WeightForm, expert: int | None) -> Packed:
        """See `interpret.weights.Read`; what kernels take is brought into the form of one matrix."""
        values = self.mapped(name)
        scales = self.mapped(f"{name}.scales") if f"{name}.scales" in self.places else None
        if expert is None:
            return Packed(values, scales)
        one, factors = values[expert], None if scales is None else scales[expert]
        if self.experts[_experts_of(name)] != "int4":
            return Packed(one, factors)
        codes, halves = plugin.load("sparse_moe", "pack").unpack_int4(one, factors)
        # From an offset of half the range to two's complement.
        return Packed((codes[:, 0::2] | codes[:, 1::2] << 4) ^ 0x88, halves)

    def mapped(self, name: str) -> NDArray[np.generic]:
        """A tensor, read-only, of the file itself."""
        place = self.places[name]
        dtype = NUMPY.get(place.dtype, np.dtype(place.dtype))
        return np.memmap(self.directory / place.file, dtype, "r", place.offset, place.shape)


def _experts_of(name: str) -> str:
    """The prefix of a stacked parameter: `P.moe` of `P.moe.up_proj.weight`."""
    return name.rsplit(".", 2)[0]
