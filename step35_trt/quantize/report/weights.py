"""Weight errors of a conversion without calibration: some rows of both checkpoints are compared."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from step35_trt.quantize.calibration.report import MatrixReport, StageReport
from step35_trt.quantize.calibration.sites import stages
from step35_trt.quantize.report.sizes import spelled, stored_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from step35_trt.checkpoint import Checkpoint

SAMPLE = 1 << 22  # values of a matrix that are compared; of stacked experts at least one whole expert
RUNS = 8  # places they are taken from


def compare_weights(
    before: Checkpoint, after: Checkpoint, tick: Callable[[str], None], sample: int = SAMPLE
) -> tuple[tuple[StageReport, ...], float]:
    """Relative errors of every matrix, from at least `sample` values of each, spread evenly.

    Args:
        before: The original.
        after: Its conversion, nothing folded.
        tick: Called with the stage that is done.
        sample: Values of a matrix.

    Returns:
        Stages with weight errors only, and the share of all matrices' values that were compared.
    """
    found, compared, whole = [], 0, 0
    for stage in stages(before.config):
        matrices = []
        for name in stage.matrices:
            shape, error, size = before.shape(name), 0.0, 0.0
            for part in _places(shape, sample):
                original = before.read(name, part)
                error += float(np.square(after.read(name, part) - original, dtype=np.float64).sum())
                size += float(np.square(original, dtype=np.float64).sum())
                compared += original.size
            whole += math.prod(shape)
            matrices.append(
                MatrixReport(
                    name=name,
                    coding=spelled(after.codings[name]),
                    weight_error=math.sqrt(error / size) if size else 0.0,
                    output_error=None,
                    bytes_before=stored_bytes(before, name),
                    bytes_after=stored_bytes(after, name),
                )
            )
        found.append(StageReport(name=stage.name, output_error=None, matrices=tuple(matrices)))
        tick(stage.name)
    return tuple(found), compared / whole


def _places(shape: tuple[int, ...], sample: int) -> Iterator[slice]:
    """Slices of the first axis that hold about `sample` values, a few runs spread over it."""
    count = shape[0]
    wanted = min(count, math.ceil(sample / math.prod(shape[1:])))
    runs = min(RUNS, wanted)
    if wanted == count:
        yield slice(0, count)
        return
    for run in range(runs):
        start, stop = (count * run // runs, count * (run + 1) // runs)
        yield slice(start, min(stop, start + math.ceil(wanted / runs)))
