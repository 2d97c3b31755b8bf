"""Build every distinct segment of the full model for DGX Spark, without the card.

`python -m benchmarks.segments [--constants] [RECIPE ...]`; weights are inputs of the engines, or with
`--constants` random values inside them, which no two layers could share.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections import Counter
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np
from rich.console import Console
from rich.table import Table

from step35_trt.checkpoint import expected_tensors
from step35_trt.config import Step35Config
from step35_trt.dialects.tensorrt import ConstantWeights
from step35_trt.dialects.tensorrt_segment import Builder, profiles
from step35_trt.lower import ModelPrograms
from step35_trt.quantize.recipe import Recipe
from step35_trt.resources import PUBLISHED
from step35_trt.weight_forms import NUMPY, Forms, Packed

if TYPE_CHECKING:
    from step35_trt.weight_forms import WeightForm

RECIPES = ["int4-awq", "fp8", "bf16"]
CAPABILITY = "12.1"
MEMORY_BUDGET = 6e9
KIB, MIB = 1 << 10, 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--constants", action="store_true")
    arguments = parser.parse_args()
    console = Console(width=120)
    for name in arguments.recipes:
        console.print(_table(name, arguments.constants))


def _table(recipe: str, constants: bool) -> Table:
    config = Step35Config.load(PUBLISHED)
    forms = Forms.of(Recipe.load(recipe), expected_tensors(config))
    started = time.perf_counter()
    made = ModelPrograms.of(config, forms)
    traced = time.perf_counter() - started
    steps = [step for program in made.programs for step in program.steps if step.kind == "segment"]
    uses = Counter(step.engine for step in steps)
    builder, ranges = Builder.rtx(), profiles(sequences=8, draft_tokens=3, prefill_chunk=1024)
    table = Table("engine", "last module of the first use", "uses", "layers", "weights", "engine", "build")
    seconds = size = total = 0.0
    for key, segment in made.segments.items():
        written = builder.write(segment, forms, ConstantWeights(_random) if constants else None)
        engine = builder.build(written, ranges, CAPABILITY)
        weights = sum(forms(name).nbytes for name in segment.matrices)
        seconds, size = seconds + engine.seconds, size + len(engine.data)
        total += len(engine.data) * (uses[key] if constants else 1)
        table.add_row(
            key,
            segment.path,
            str(uses[key]),
            str(written.network.num_layers),
            f"{weights / MIB:.1f} MiB",
            f"{len(engine.data) / KIB:,.0f} KiB",
            f"{engine.seconds:.2f} s",
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB / 1e9
    table.title = (
        f"{recipe}, weights as {'constants' if constants else 'inputs'}, compute capability {CAPABILITY}\n"
        f"{len(made.segments)} engines for {len(steps)} segments: {size / MIB:,.1f} MiB in {seconds:.1f} s, "
        f"{total / MIB:,.0f} MiB on disk\n"
        f"traced in {traced:.2f} s, peak RSS {peak:.2f} GB (budget {MEMORY_BUDGET / 1e9:g})"
    )
    return table


def _random(name: str, form: WeightForm) -> Packed:
    rng = np.random.default_rng(crc32(name.encode()))
    if form.dtype == "float32":
        return Packed(rng.normal(size=form.shape).astype(np.float32))
    if form.dtype == "bfloat16":
        # Between 1 and 2 as bits: as much to store as any values, and fast to draw.
        return Packed(rng.integers(0x3F80, 0x4000, form.shape, np.uint16).view(NUMPY["bfloat16"]))
    assert form.scale_dtype is not None
    scales = rng.uniform(0.01, 0.02, form.scale_shape).astype(NUMPY[form.scale_dtype])
    if form.dtype == "int4":
        return Packed(rng.integers(0, 256, (form.shape[0], form.shape[1] // 2), np.uint8), scales)
    return Packed(rng.integers(0, 0x70, form.shape, np.uint8).view(NUMPY[form.dtype]), scales)


if __name__ == "__main__":
    main()
