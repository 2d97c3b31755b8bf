"""The report of a conversion, made once and kept inside the converted checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from step35_trt import __version__
from step35_trt.checkpoint import Checkpoint
from step35_trt.errors import CorruptInputError
from step35_trt.journal import plain_os_errors, replacing
from step35_trt.quantize.calibration.report import StageReport
from step35_trt.quantize.calibration.sites import stages
from step35_trt.quantize.report import page
from step35_trt.quantize.report.data import QuantizationReport, Recipe
from step35_trt.quantize.report.sizes import group_bytes
from step35_trt.quantize.report.weights import compare_weights
from step35_trt.quantize.run import REPORT

if TYPE_CHECKING:
    from pathlib import Path

    from step35_trt.progress import Progress
    from step35_trt.quantize.report.data import Quality
    from step35_trt.quantize.report.held_out import HeldOut
    from step35_trt.quantize.run import Job

JSON, HTML = "reports/quantization.json", "reports/quantization.html"


def write_report(
    job: Job, out: Path, held: HeldOut | None = None, progress: Progress | None = None
) -> QuantizationReport:
    """Measure a finished conversion; what is there already from the same inputs is read again.

    The content depends on the inputs and the machine's arithmetic alone. With held-out text, a conversion
    without calibration is measured layer by layer on that text as well.

    Args:
        job: The conversion.
        out: Its result.
        held: Text to judge it by; None: weights and bytes only.
        progress: Told how far it is.

    Raises:
        Step35Error: one of its kinds; stages that are finished stay for the next run.
    """
    inputs = [__version__, job.key, held.digest if held else None]
    key = hashlib.blake2b(json.dumps(inputs).encode(), digest_size=16).hexdigest()
    there = _existing(out)
    if there is not None and there.key == key:
        return there
    after = Checkpoint.open(out)
    work = out.with_name(out.name + ".evaluation")
    ticker = _Ticker(job.source, progress, (job.token_ids is None) + (held is not None))
    found, seen, compared = _stages(job, after, held, work, ticker)
    report = QuantizationReport(
        key=key,
        version=__version__,
        recipe=Recipe.model_validate(job.recipe, from_attributes=True),
        seen=seen,
        compared=compared,
        calibrated=job.token_ids is not None,
        groups=group_bytes(job.source, after),
        stages=found,
        quality=_quality(job, after, held, work, ticker) if held else None,
    )
    with plain_os_errors(out / JSON):
        (out / JSON).parent.mkdir(exist_ok=True)
    with replacing(out / HTML) as stream:
        stream.write(page.render(report).encode())
    with replacing(out / JSON) as stream:  # last: this file says that the report is whole
        stream.write((report.model_dump_json(indent=1) + "\n").encode())
    for folder in (work, _stage_work(work)):
        shutil.rmtree(folder, ignore_errors=True)
    return report


class _Ticker:
    """Progress in bytes of the original's weights, which pass `passes` times."""

    def __init__(self, source: Checkpoint, progress: Progress | None, passes: int) -> None:
        self._sizes = {
            stage.name: sum(math.prod(source.shape(name)) for name in stage.matrices)
            for stage in stages(source.config)
        }
        self._total, self._done, self._progress = passes * sum(self._sizes.values()), 0, progress

    def __call__(self, stage: str) -> None:
        self._done += self._sizes[stage]
        if self._progress:
            self._progress(2 * self._done, 2 * self._total, f"measuring {stage}")


def _stages(
    job: Job, after: Checkpoint, held: HeldOut | None, work: Path, ticker: _Ticker
) -> tuple[tuple[StageReport, ...], int, float]:
    """What is known of each stage, the tokens it was measured on, and the share of weights compared."""
    if job.token_ids is not None:
        try:
            content = (after.directory / REPORT).read_bytes()
            return TypeAdapter(tuple[StageReport, ...]).validate_json(content), job.token_ids.size, 1.0
        except (OSError, ValidationError):
            raise CorruptInputError(
                f"{after.directory / REPORT} is missing or damaged", "Quantise again into a new directory."
            ) from None
    if held is None:
        found, share = compare_weights(job.source, after, ticker)
        return found, 0, share
    from step35_trt.quantize.calibration import calibrate

    measured = calibrate(
        job.source,
        job.recipe,
        held.token_ids,
        _stage_work(work),
        method="none",
        max_host_memory=job.options.max_host_memory,
    )
    for stage in measured.stages:
        ticker(stage.name)
    return measured.stages, held.token_ids.size, 1.0


def _stage_work(work: Path) -> Path:
    return work.with_name(work.name + ".stages")


def _quality(job: Job, after: Checkpoint, held: HeldOut, work: Path, ticker: _Ticker) -> Quality:
    from step35_trt.quantize.report.quality import measure_quality

    return measure_quality(
        job.source,
        after,
        held,
        work,
        fp8_activations=job.recipe.activations == "fp8",
        max_host_memory=job.options.max_host_memory,
        tick=ticker,
    )


def _existing(out: Path) -> QuantizationReport | None:
    try:
        report = QuantizationReport.model_validate_json((out / JSON).read_bytes())
    except (OSError, ValidationError):
        return None
    return report if (out / HTML).is_file() else None
