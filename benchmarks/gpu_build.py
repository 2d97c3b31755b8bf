"""How fast a bundle for a GPU is built: what `engines/build-rates/` is filled from.

    python -m benchmarks.gpu_build [FOLDER]

A layer of the published width (one of attention, 32 of 288 experts) is quantised into FOLDER in each form,
and its weights are packed, written, synced and digested as a build does. Kernels and segments are those of
the published model, compiled into an empty cache. Weights start in the page cache; all is timed once.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.convert import write_layer
from step35_trt import bundle
from step35_trt.build_steps import weights_step
from step35_trt.build_tensorrt import compile_segment
from step35_trt.checkpoint import Checkpoint
from step35_trt.config import Step35Config
from step35_trt.deployment import Deployment
from step35_trt.dialects.tensorrt_segment import Builder
from step35_trt.engine import EngineSpec
from step35_trt.gpu_forms import deployed_forms
from step35_trt.gpu_weights import GpuWeights, Packing
from step35_trt.kernels.compile import compile_kernels
from step35_trt.quantize.convert import conversion_key, convert
from step35_trt.quantize.recipe import Recipe
from step35_trt.resources import PUBLISHED
from step35_trt.sharing import ALONE

RECIPES = ("bf16", "int4-awq", "fp8", "fp8-official")


def pack(folder: Path, source: Checkpoint, name: str) -> None:
    """Quantise, to nearest, and pack; prints the rates of the experts and of the rest."""
    recipe = Recipe.load(name).model_copy(update={"calibration": None})
    if name != "bf16":
        convert(source, folder / name, recipe, conversion_key(source, recipe))
        source = Checkpoint.open(folder / name)
    forms, experts = deployed_forms(recipe, source.config)
    shapes = forms.shapes
    for kind, chosen in (
        (next(iter(experts.values())), {n: s for n, s in shapes.items() if len(s) == 3}),
        ("dense", {n: s for n, s in shapes.items() if len(s) < 3}),
    ):
        some = type(forms)(chosen, forms.coding, forms.activation)
        laid = GpuWeights(some, experts, ALONE, Packing(source, some, experts, ALONE))
        started, size = time.perf_counter(), 0
        for file in laid.files.values():
            path = folder / "out" / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            for _ in weights_step(file).write(path):
                pass
            bundle.sync(path)
            bundle.record(path, file.name)
            size += path.stat().st_size
            path.unlink()
        seconds = time.perf_counter() - started
        speed = size / seconds / 1e9
        print(f"{name:14} {kind:12} {size / 1e9:.3f} GB stored in {seconds:.2f} s, {speed:.2f} GB/s")


def compile_all() -> None:
    """Kernels for Hopper, segments for DGX Spark, of the published model."""
    config = Step35Config.load(PUBLISHED)
    for engine in ("h200-int4", "h200x2-fp8"):
        spec = EngineSpec.load(engine)
        variants = Deployment.of(config, Recipe.load(spec.recipe), spec).kernels()
        started = time.perf_counter()
        made = compile_kernels(variants, Deployment.of(config, Recipe.load(spec.recipe), spec).target)
        seconds = time.perf_counter() - started
        size = sum(len(kernel.cubin) for kernel in made)
        print(f"{engine}: {len(made)} kernels, {size / 1e3:.0f} kB, in {seconds:.1f} s")
    spec = EngineSpec.load("dgx-spark-int4")
    made_of = Deployment.of(config, Recipe.load(spec.recipe), spec)
    builder, started = Builder.rtx(), time.perf_counter()
    sizes = [len(compile_segment(made_of, key, builder)) for key in made_of.programs.segments]
    seconds = time.perf_counter() - started
    print(f"dgx-spark-int4: {len(sizes)} segments, {sum(sizes) / 1e6:.1f} MB, in {seconds:.1f} s")


def main(folder: Path) -> None:
    """All of it."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    compile_all()
    source = Checkpoint.open(write_layer(folder / "plain").parent)
    for name in RECIPES:
        pack(folder, source, name)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if sys.argv[1:] else None) as made:
        main(Path(made))
