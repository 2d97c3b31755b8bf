"""One matrix: what is folded into it, how far its groups are clipped, and what that costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from step35_trt.quantize.calibration.awq import IN_CACHE
from step35_trt.quantize.calibration.clipping import clip_indices
from step35_trt.quantize.calibration.quantisers import fake_quantise
from step35_trt.quantize.calibration.report import MatrixReport
from step35_trt.quantize.folding import Scaling
from step35_trt.quantize.formats import DTYPES

if TYPE_CHECKING:
    from torch import Tensor

    from step35_trt.quantize.folding import TensorSource
    from step35_trt.quantize.formats import Coding


@dataclass
class Errors:
    """Sums of squares over the parts of a matrix."""

    weight: float = 0.0
    weight_size: float = 0.0
    output: float = 0.0
    output_size: float = 0.0

    def add(self, other: Errors) -> None:
        """Another part, or another expert."""
        self.weight += other.weight
        self.weight_size += other.weight_size
        self.output += other.output
        self.output_size += other.output_size

    @property
    def relative_weight(self) -> float:
        """Relative error in the Frobenius norm."""
        return math.sqrt(self.weight / self.weight_size) if self.weight_size else 0.0

    @property
    def relative_output(self) -> float | None:
        """The same of the product; None without any."""
        return math.sqrt(self.output / self.output_size) if self.output_size else None


@dataclass
class Part:
    """Rows of a matrix, or one expert: factors `[n]` and `[K]`, see `Scaling`."""

    coding: Coding
    rows: Tensor | None
    columns: Tensor | None

    def rows_of(self, part: slice) -> Part:
        """Some of the rows."""
        return Part(self.coding, None if self.rows is None else self.rows[part], self.columns)

    def to(self, device: torch.device) -> Part:
        """On another device."""
        rows, columns = (None if side is None else side.to(device) for side in (self.rows, self.columns))
        return Part(self.coding, rows, columns)


@dataclass
class MatrixPlan:
    """What is decided about one parameter, `Scaling` in the making; stacked ones have a leading axis."""

    name: str
    coding: Coding
    rows: Tensor | None = None
    columns: Tensor | None = None
    clip: Tensor | None = None
    expert_errors: tuple[float, ...] = ()

    def part(self, rows: slice) -> Part:
        """Some rows of a dense matrix."""
        return Part(self.coding, self.rows, self.columns).rows_of(rows)

    def expert(self, index: int) -> Part:
        """One expert; the columns' factors may be shared by all."""
        columns = self.columns
        if columns is not None and columns.ndim == 2:
            columns = columns[index]
        return Part(self.coding, None if self.rows is None else self.rows[index], columns)

    def scaling(self) -> Scaling | None:
        """For the folding; None where the parameter stays as it is."""
        sides = (self.rows, self.columns, self.clip)
        if all(side is None for side in sides):
            return None
        rows, columns, clip = (None if side is None else side.contiguous().numpy() for side in sides)
        return Scaling(rows=rows, columns=columns, clip=clip)

    def report(self, errors: Errors, source: TensorSource) -> MatrixReport:
        """The matrix's line of the report."""
        shape = source.shape(self.name)
        entries = self.coding.entries(self.name, shape).values()
        stored = (self.name, f"{self.name}_scale", f"{self.name}_scale_inv")
        coding = self.coding
        return MatrixReport(
            name=self.name,
            coding=f"{coding.kind}/{coding.block}" if coding.block else coding.kind,
            weight_error=errors.relative_weight,
            output_error=errors.relative_output,
            experts=self.expert_errors,
            clipped=0.0 if self.clip is None else float((self.clip > 0).float().mean()),
            bytes_before=sum(source.tensors[name].nbytes for name in stored if name in source.tensors),
            bytes_after=sum(math.prod(size) * DTYPES[dtype].itemsize for dtype, size in entries),
        )


def settle(
    weight: Tensor,
    part: Part,
    errors: Errors,
    inputs: Tensor | None,
    mean_square: Tensor | None,
    search: bool,
) -> Tensor | None:
    """Choose the clips of some rows and add their errors.

    Args:
        weight: fp32 `[n, K]`, original.
        part: Their factors.
        errors: Added to.
        inputs: `[m, K]`, original; None: no output error.
        mean_square: `[K]` of the original inputs; None: all weights count alike.
        search: Whether groups may be clipped.

    Returns:
        uint8 `[n, K / block]`, None where nothing is clipped.
    """
    clips = []
    for first in range(0, len(weight), IN_CACHE):
        rows = slice(first, first + IN_CACHE)
        clip, error = _settle(weight[rows], part.rows_of(rows), mean_square, search)
        errors.weight += float(error.square().sum())
        errors.weight_size += float(weight[rows].square().sum())
        if inputs is not None and len(inputs):
            errors.output += float((inputs @ error.T).square().sum())
            errors.output_size += float((inputs @ weight[rows].T).square().sum())
        if clip is not None:
            clips.append(clip)
    return torch.cat(clips) if clips else None


def _settle(
    weight: Tensor, part: Part, mean_square: Tensor | None, search: bool
) -> tuple[Tensor | None, Tensor]:
    """Clips, and what quantising adds to the original weight."""
    folded = weight
    if part.rows is not None:
        folded = folded * part.rows[:, None]
    if part.columns is not None:
        folded = folded * part.columns
        mean_square = None if mean_square is None else mean_square / part.columns.square()
    clip = clip_indices(folded, part.coding, mean_square) if search and part.coding.kind == "int4" else None
    found = fake_quantise(folded, part.coding, clip)
    if part.columns is not None:
        found = found / part.columns
    if part.rows is not None:
        found = found / part.rows[:, None]
    return clip, found - weight
