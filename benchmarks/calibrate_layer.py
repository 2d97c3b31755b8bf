"""Calibration at real width: one dense and one MoE layer of Step 3.5 Flash, in 12 GiB of address space.

Writes a synthetic slice (0.6 GB and 9.3 GB in bf16; Student-t weights, norms with outlier channels), runs it
through `fp8` and `int4-awq`, the latter also rounded to nearest, each in a process whose address space is
limited, and prints the error of the layers' outputs against bf16.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.cpu_slice import peak_rss, slice_config
from step35_trt.checkpoint import Checkpoint, expected_tensors
from step35_trt.config import Step35Config

VOCABULARY = 1024  # the embedding and the head are not what is measured
FREEDOM = 5  # of Student's t
OUTLIERS, OUTLIER_GAIN = 0.005, 20.0  # share of a norm's channels; how far they stand out
RUNS = (("int4-awq", "awq"), ("int4-awq", "none"), ("fp8", "none"))
PERIOD = (1 << 24) + 7  # weights before the random pattern repeats, not a multiple of any row


def two_layers(**changes: Any) -> dict[str, Any]:
    """`config.json`: a dense layer with full attention, then a MoE layer with a window."""
    raw = slice_config()
    del raw["quantization_config"]
    return (
        raw
        | {
            "vocab_size": VOCABULARY,
            "num_hidden_layers": 2,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_theta": [5e6, 1e4],
            "partial_rotary_factors": [0.5, 1.0],
            "moe_layers_enum": "1",
            "swiglu_limits": [0, 0],
            "swiglu_limits_shared": [0, 0],
        }
        | changes
    )


def write_slice(directory: Path, raw: dict[str, Any], most: int = 5_000_000_000) -> None:
    """Stream random weights into shards of about `most` bytes, as a checkpoint on the hub has them."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    rng = np.random.default_rng(0)
    pattern = rng.standard_t(FREEDOM, PERIOD).astype(np.float32)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    total = 0
    for name, shape in expected_tensors(Step35Config.parse(raw)).items():
        shards.setdefault(f"model-{total // most:05}.safetensors", {})[name] = shape
        total += 2 * int(np.prod(shape))
    position = 0
    for file, tensors in shards.items():
        offset, header = 0, {}
        for name, shape in tensors.items():
            size = int(np.prod(shape)) * 2
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header).encode()
        with (directory / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name, shape in tensors.items():
                if len(shape) == 1:
                    stream.write(_vector(name, shape[0], rng).astype(ml_dtypes.bfloat16).tobytes())
                    continue
                scaled = (pattern / np.sqrt(2 * shape[-1])).astype(ml_dtypes.bfloat16)
                left = int(np.prod(shape))
                while left:
                    part = scaled[position : position + left]
                    stream.write(part.tobytes())
                    left -= len(part)
                    position = (position + len(part)) % PERIOD
    names = {name: file for file, tensors in shards.items() for name in tensors}
    index = {"metadata": {}, "weight_map": names}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _vector(name: str, size: int, rng: np.random.Generator) -> np.ndarray:
    if name.endswith("router_bias"):
        return rng.normal(0, 0.01, size)
    gamma = np.exp(rng.normal(0, 0.3, size))
    if "layernorm" in name:
        gamma[rng.random(size) < OUTLIERS] *= OUTLIER_GAIN
    return gamma - 1


def run(directory: Path, work: Path, recipe: str, method: Any, tokens: int, budget: int) -> dict[str, Any]:
    """Calibrate in this process under a limit of its address space."""
    resource.setrlimit(resource.RLIMIT_AS, (budget, budget))
    from step35_trt.quantize.calibration import calibrate
    from step35_trt.quantize.recipe import Recipe

    checkpoint = Checkpoint.open(directory)
    ids = np.random.default_rng(1).integers(0, checkpoint.config.vocab_size, (tokens // 512, 512))
    started = time.perf_counter()
    done = calibrate(
        checkpoint,
        Recipe.load(recipe),
        ids,
        work,
        method=method,
        max_host_memory=budget,
        min_expert_tokens=16,
        progress=_say,
    )
    peak = Path("/proc/self/status").read_text(encoding="utf-8").split("VmPeak:")[1].split()[0]
    layers = {s.name: s for s in done.stages if s.name.startswith("layer-")}
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "peak_rss": peak_rss(),
        "peak_address_space": int(peak) * 1024,
        "output_error": {name: s.output_error for name, s in layers.items()},
        "flips": {name: s.routing.model_dump() for name, s in layers.items() if s.routing},
        "fewest_tokens": min(min(s.coverage.tokens) for s in layers.values() if s.coverage),
        "fallback": sum(len(s.coverage.fallback) for s in layers.values() if s.coverage),
        "bytes": {
            name: [sum(m.bytes_before for m in s.matrices), sum(m.bytes_after for m in s.matrices)]
            for name, s in layers.items()
        },
    }


_said = [0.0]


def _say(done: int, total: int, stage: str) -> None:
    if time.monotonic() - _said[0] > 10 and sys.stderr.isatty():
        _said[0] = time.monotonic()
        print(f"{stage}: {done / total:.0%}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/calibrate-layer"))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--gib", type=float, default=12.0, help="address space of each run")
    parser.add_argument("--keep", action="store_true", help="keep the slice, 10 GB, for another run")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--run", nargs=2, metavar=("RECIPE", "METHOD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    checkpoint, budget = options.work / "checkpoint", int(options.gib * 2**30)
    if options.run:
        recipe, method = options.run
        work = options.work / f"{recipe}-{method}"
        shutil.rmtree(work, ignore_errors=True)
        print(json.dumps(run(checkpoint, work, recipe, method, options.tokens, budget)))
        return
    if not checkpoint.exists():
        partial = checkpoint.with_name("checkpoint.writing")
        shutil.rmtree(partial, ignore_errors=True)
        write_slice(partial, two_layers())
        partial.rename(checkpoint)
    results = {}
    for recipe, method in RUNS:
        command = [sys.executable, "-m", "benchmarks.calibrate_layer", "--run", recipe, method]
        command += ["--work", str(options.work), "--tokens", str(options.tokens), "--gib", str(options.gib)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results[f"{recipe} {method}"] = found = json.loads(done.stdout)
        if not options.json:
            errors = ", ".join(f"{name} {value:.4f}" for name, value in found["output_error"].items())
            space = f"{found['peak_address_space'] / 2**30:.1f} of {options.gib:g} GiB"
            print(
                f"{recipe:>8} {'to nearest' if method == 'none' else method:<10}: output error {errors}; "
                f"{found['seconds']} s ({found['cpu_seconds']} s of CPU), address space {space}, "
                f"peak RSS {found['peak_rss'] / 2**30:.1f} GiB; fewest tokens of an "
                f"expert {found['fewest_tokens']}, {found['fallback']} fall back",
                flush=True,
            )
    if options.json:
        print(json.dumps(results))
    if not options.keep:
        shutil.rmtree(options.work)


if __name__ == "__main__":
    main()
