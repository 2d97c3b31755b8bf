"""A whole bundle for DGX Spark of a slice at real width, built and opened on this machine.

    python -m benchmarks.spark_slice [--layers 6] [--work FOLDER]

The first layers of Step 3.5 Flash with one MTP module, in the official FP8 layout: random in all dense
weights and in the first 64 MiB of each stack of experts. The rest of those is a hole in the file, read as
zeros at the same cost, so that 19 GB of source take 7 GB of disk. It is rounded to the engine's recipe, since
calibrating it would take hours, built, opened with every weight mapped, and read whole beside a plain read
of the same files. Each stage is a process of its own; its peak RSS counts mapped pages of the files too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from benchmarks.cpu_slice import BLOCK, peak_rss
from step35_trt.bundle import KERNELS, SEGMENTS, WEIGHTS, Bundle, forget
from step35_trt.checkpoint import expected_tensors
from step35_trt.config import Step35Config
from step35_trt.digests import unlike
from step35_trt.engine import EngineSpec
from step35_trt.program import SteppedProgram
from step35_trt.quantize.recipe import Recipe
from step35_trt.resources import PUBLISHED

if TYPE_CHECKING:
    from collections.abc import Iterator

ENGINE = "dgx-spark-int4"
MEMORY_BUDGET = 6e9
FILLED = 64 << 20  # bytes of a stack of experts that are no hole
BUFFER = 1 << 20
TURNS = 2
STAGES = ("quantise", "build", "open", "check")


def slice_config(layers: int) -> dict[str, Any]:
    """`config.json` of the first layers and the first MTP module of the published model."""
    raw: dict[str, Any] = json.loads((PUBLISHED / "config.json").read_text(encoding="utf-8"))
    whole = raw["num_hidden_layers"]
    for name, value in raw.items():
        if isinstance(value, list) and len(value) > whole:
            raw[name] = value[:layers] + value[whole : whole + 1]
    sparse = [index for index in raw["moe_layers_enum"].split(",") if int(index) < layers]
    return raw | {
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": 1,
        "moe_layers_enum": ",".join(sparse),
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]},
    }


def write_slice(directory: Path, layers: int) -> int:
    """Stream the checkpoint; returns its bytes, holes included."""
    directory.mkdir(parents=True)
    raw = slice_config(layers)
    (directory / "config.json").write_text(json.dumps(raw))
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, (1 << 20) + 7).astype(np.float32)
    plain = (noise * 0.02).astype(ml_dtypes.bfloat16).tobytes()
    codes = (noise * 64).astype(ml_dtypes.float8_e4m3fn).tobytes()
    header: dict[str, Any] = {}
    content: list[tuple[int, bytes, int]] = []
    offset = 0

    def add(name: str, dtype: str, shape: tuple[int, ...], size: int, pattern: bytes, filled: int) -> None:
        nonlocal offset
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        content.append((size, pattern, min(size, filled)))
        offset += size

    for name, shape in expected_tensors(Step35Config.parse(raw)).items():
        count = int(np.prod(shape))
        if len(shape) == 3:
            blocks = (shape[0], -(-shape[1] // BLOCK), -(-shape[2] // BLOCK))
            scales = np.full(blocks, 0.02 / 64, np.float32).tobytes()
            add(name, "F8_E4M3", shape, count, codes, FILLED)
            add(f"{name}_scale_inv", "F32", blocks, len(scales), scales, len(scales))
        else:
            add(name, "BF16", shape, 2 * count, plain, 2 * count)
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for size, pattern, filled in content:
            for _ in range(filled // len(pattern)):
                stream.write(pattern)
            stream.write(pattern[: filled % len(pattern)])
            stream.seek(size - filled, os.SEEK_CUR)
        stream.truncate()
    return offset


def quantise(work: Path) -> dict[str, Any]:
    """To the engine's precisions, rounded."""
    from step35_trt.quantize.run import CalibrationOptions, Job

    recipe = Recipe.load(EngineSpec.load(ENGINE).recipe).model_copy(update={"calibration": None})
    job = Job.of(work / "checkpoint", recipe, CalibrationOptions())
    seconds = _seconds(lambda: job.run(work / "quantised"))
    return {"seconds": seconds, "bytes": _bytes(work / "quantised"), "peak_rss": peak_rss()}


def build_bundle(work: Path) -> dict[str, Any]:
    """As `build-engine` does."""
    from step35_trt.build import build

    seconds = _seconds(lambda: build(work / "quantised", work / "bundle", EngineSpec.load(ENGINE)))
    parts = {part: _bytes(work / "bundle" / part) for part in (SEGMENTS, KERNELS, WEIGHTS)}
    counts = {part: len(list((work / "bundle" / part).iterdir())) for part in parts}
    return {
        "seconds": seconds,
        "bytes": _bytes(work / "bundle"),
        "parts": parts,
        "files": counts,
        "peak_rss": peak_rss(),
    }


def open_bundle(work: Path) -> dict[str, Any]:
    """Open the bundle and map every weight."""
    from step35_trt.gpu_weights import StoredWeights

    opened: list[Bundle] = []
    seconds = [_seconds(lambda: opened.append(Bundle.open(work / "bundle"))) for _ in range(TURNS)]
    files = opened[-1].manifest.files
    weights = {name: record for name, record in files.items() if name.startswith(f"{WEIGHTS}/")}
    sampled = [_seconds(lambda: list(unlike(work / "bundle", weights))) for _ in range(TURNS)]
    program, before = opened[-1].program, _rss()
    assert isinstance(program, SteppedProgram)
    stored = StoredWeights(work / "bundle", program.weights, program.experts)
    mapped = [stored.mapped(name) for name in program.weights]
    assert all(isinstance(tensor, np.memmap) for tensor in mapped)
    return {
        "open_seconds": min(seconds),
        "sample_seconds": min(sampled),
        "files": len(weights),
        "tensors": len(mapped),
        "bytes": sum(tensor.nbytes for tensor in mapped),
        "rss_before": before,
        "rss_after": _rss(),
    }


def check_bundle(work: Path) -> dict[str, Any]:
    """Read every byte plainly, then with digests; from the disk, in turns."""
    opened = Bundle.open(work / "bundle")
    plain, checked = [], []
    for _ in range(TURNS):
        _forget(work / "bundle")
        plain.append(_seconds(lambda: _read(work / "bundle")))
        _forget(work / "bundle")
        checked.append(_seconds(lambda: _expect_whole(opened)))
    return {"bytes": _bytes(work / "bundle"), "plain_seconds": min(plain), "check_seconds": min(checked)}


def _expect_whole(opened: Bundle) -> None:
    assert opened.damaged() == []


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file())


def _bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in _files(directory))


def _read(directory: Path) -> None:
    buffer = bytearray(BUFFER)
    for path in _files(directory):
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def _forget(directory: Path) -> None:
    """Drop the files from the page cache; what is not synced stays."""
    for path in _files(directory):
        forget(path)


def _seconds(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _rss() -> int:
    """Resident bytes of this process now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--work", type=Path, default=Path("build/spark-slice"), help="kept for the next run")
    parser.add_argument("--only", choices=STAGES, help="repeat one stage, and print it as JSON")
    options = parser.parse_args()
    if options.only:
        stage = {"quantise": quantise, "build": build_bundle, "open": open_bundle, "check": check_bundle}
        print(json.dumps(stage[options.only](options.work)))
        return
    if not (options.work / "bundle").exists():
        shutil.rmtree(options.work, ignore_errors=True)
        source = write_slice(options.work / "checkpoint", options.layers)
        print(f"source: {options.layers} layers and a module, official FP8, {source / 1e9:.2f} GB")
        made = _stage("quantise", options.work)
        print(f"quantised, rounded: {made['bytes'] / 1e9:.2f} GB in {made['seconds']:.1f} s, {_peak(made)}")
        made = _stage("build", options.work)
        print(f"bundle: {made['bytes'] / 1e9:.2f} GB in {made['seconds']:.1f} s, {_peak(made)}")
        for part, nbytes in made["parts"].items():
            print(f"  {made['files'][part]} files of {part}: {nbytes:,} bytes")
    found = _stage("open", options.work)
    print(
        f"opened and checked in {found['open_seconds'] * 1e3:.1f} ms, {found['sample_seconds'] * 1e3:.1f} of "
        f"them for samples of {found['files']} files of weights; {found['tensors']} tensors, "
        f"{found['bytes'] / 1e9:.2f} GB, mapped: RSS {found['rss_before'] / 1e6:.1f} MB before and "
        f"{found['rss_after'] / 1e6:.1f} MB after"
    )
    found = _stage("check", options.work)
    speeds = [found["bytes"] / found[kind] / 1e9 for kind in ("check_seconds", "plain_seconds")]
    print(
        f"full check at {speeds[0]:.2f} GB/s, a plain read of the same files at {speeds[1]:.2f}: "
        f"ratio {speeds[0] / speeds[1]:.2f}"
    )


def _peak(made: dict[str, Any]) -> str:
    return f"peak RSS {made['peak_rss'] / 1e9:.2f} GB (budget {MEMORY_BUDGET / 1e9:g})"


def _stage(name: str, work: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.spark_slice", "--only", name, "--work", str(work)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
