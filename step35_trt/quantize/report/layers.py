"""One line a stage: what its matrices' figures come to together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from step35_trt.quantize.calibration.report import MatrixReport, StageReport
    from step35_trt.quantize.report.data import QuantizationReport

KINDS = ("attention", "dense and shared MLP", "routed experts")


@dataclass(frozen=True)
class StageLine:
    """Figures of a stage; None where nothing was measured.

    Attributes:
        name: `embedding`, `layer-i`, `head`, `mtp-k`.
        weight_error: Of all matrices, see `joint_error`.
        output_error: See `StageReport`.
        drift: See `Quality`.
        flips: Share of tokens whose experts changed.
        beyond: Share of tokens whose experts changed more than rounding explains.
        before: Bytes of the matrices.
        after: Bytes of the matrices.
    """

    name: str
    weight_error: float
    output_error: float | None
    drift: float | None
    flips: float | None
    beyond: float | None
    before: int
    after: int


def stage_lines(report: QuantizationReport) -> tuple[StageLine, ...]:
    """Every stage."""
    drift = report.quality.drift if report.quality else {}
    return tuple(
        StageLine(
            name=stage.name,
            weight_error=joint_error(stage.matrices),
            output_error=stage.output_error,
            drift=drift.get(stage.name),
            flips=_share(stage, "flips"),
            beyond=_share(stage, "beyond_rounding"),
            before=sum(matrix.bytes_before for matrix in stage.matrices),
            after=sum(matrix.bytes_after for matrix in stage.matrices),
        )
        for stage in report.stages
    )


def joint_error(matrices: Iterable[MatrixReport]) -> float:
    """Root mean square of relative errors, each matrix weighed by its bytes in the original."""
    pairs = [(matrix.weight_error, matrix.bytes_before) for matrix in matrices]
    whole = sum(size for _, size in pairs)
    return math.sqrt(sum(error**2 * size for error, size in pairs) / whole) if whole else 0.0


def errors_by_kind(stage: StageReport) -> dict[str, float]:
    """The same for each of `KINDS` that the stage has; router, heads and the like are none of them."""
    kinds: dict[str | None, list[MatrixReport]] = {}
    for matrix in stage.matrices:
        kinds.setdefault(_kind(matrix.name), []).append(matrix)
    return {kind: joint_error(kinds[kind]) for kind in KINDS if kind in kinds}


def short(stage: str) -> str:
    """A stage's name where there is little room."""
    return stage.removeprefix("layer-")


def _kind(name: str) -> str | None:
    if ".self_attn." in name:
        return "attention"
    if ".mlp." in name or ".share_expert." in name:
        return "dense and shared MLP"
    return "routed experts" if ".moe." in name and "_proj." in name else None


def _share(stage: StageReport, field: str) -> float | None:
    if stage.routing is None or not stage.routing.tokens:
        return None
    return float(getattr(stage.routing, field)) / stage.routing.tokens
