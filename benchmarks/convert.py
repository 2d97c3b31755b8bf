"""How fast a bf16 checkpoint is quantised, beside a plain copy of the same bytes.

    python -m benchmarks.convert [FOLDER]

A layer of the published width (one of attention, 32 of 288 experts; about 1.2 GB) is written to FOLDER, then
copied and converted in turns. Both start from a file in the page cache and end with `fsync`; the copy is the
faster of `sendfile` and `copy_file_range`. Printed are the best of the turns.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from step35_trt.bundle import sync
from step35_trt.checkpoint import Checkpoint, expected_tensors
from step35_trt.config import Step35Config
from step35_trt.quantize.convert import conversion_key, convert
from step35_trt.quantize.recipe import Recipe
from step35_trt.quantize.shard import Shard
from step35_trt.resources import NANO

if TYPE_CHECKING:
    from step35_trt.quantize.formats import Entry

RECIPES = {"int4 groups": "cpu-int4", "fp8 blocks": "fp8-official", "fp8 rows": "fp8"}
TURNS = 3
FULL_BYTES = 2 * 196_956_130_368  # the published model in bf16 without its MTP modules (specification 5)
PIECE = 32 << 20


def write_layer(folder: Path) -> Path:
    """A checkpoint of one layer of the published width, in bf16."""
    raw = json.loads((NANO / "config.json").read_text())
    attention = {"num_attention_heads": 96, "num_attention_groups": 8, "head_dim": 128, "true_head_dim": 128}
    raw |= {
        "hidden_size": 4096,
        "intermediate_size": 11264,
        "num_hidden_layers": 1,
        "num_nextn_predict_layers": 0,
        "num_attention_heads": 64,
        "num_attention_groups": 8,
        "head_dim": 128,
        "attention_other_setting": raw["attention_other_setting"] | attention,
        "moe_num_experts": 32,
        "moe_top_k": 8,
        "moe_intermediate_size": 1280,
        "share_expert_dim": 1280,
        "moe_layers_enum": "0",
    }
    for name in (
        "layer_types",
        "rope_theta",
        "partial_rotary_factors",
        "swiglu_limits",
        "swiglu_limits_shared",
    ):
        raw[name] = raw[name][:1]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    entries: dict[str, Entry] = {
        name: ("BF16", shape) for name, shape in expected_tensors(Step35Config.parse(raw)).items()
    }
    shard = Shard.lay_out("model.safetensors", entries)
    values = np.random.default_rng(0).standard_t(4, PIECE // 2) * 0.02
    piece = values.astype(ml_dtypes.bfloat16).tobytes()
    with (folder / shard.name).open("wb") as stream:
        stream.write(shard.header)
        for _ in range(shard.size // len(piece)):
            stream.write(piece)
        stream.write(piece[: shard.size - stream.tell()])
    sync(folder / shard.name)
    return folder / shard.name


def copy_seconds(file: Path, to: Path) -> float:
    """The faster of two plain copies."""

    def by_range() -> None:
        with file.open("rb") as source, to.open("wb") as target:
            left = file.stat().st_size
            while left:
                left -= os.copy_file_range(source.fileno(), target.fileno(), left)

    found = []
    for copy in (lambda: shutil.copyfile(file, to), by_range):
        started = time.perf_counter()
        copy()
        sync(to)
        found.append(time.perf_counter() - started)
        to.unlink()
    return min(found)


def convert_once(folder: str, out: str, recipe: str) -> None:
    """In a process of its own: prints seconds and the peak of resident bytes."""
    chosen = Recipe.load(recipe)
    started = time.perf_counter()
    source = Checkpoint.open(Path(folder))
    convert(source, Path(out), chosen, conversion_key(source, chosen))
    seconds = time.perf_counter() - started
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]
    print(json.dumps({"seconds": seconds, "peak": int(peak) * 1024}))


def main(folder: Path) -> None:
    file = write_layer(folder / "bf16")
    size = file.stat().st_size
    copies: list[float] = []
    found: dict[str, list[dict[str, float]]] = {form: [] for form in RECIPES}
    for _ in range(TURNS):
        copies.append(copy_seconds(file, folder / "copy"))
        for form, recipe in RECIPES.items():
            out = folder / "out"
            command = [
                sys.executable,
                "-m",
                "benchmarks.convert",
                "--once",
                str(file.parent),
                str(out),
                recipe,
            ]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[form].append(json.loads(done.stdout))
            shutil.rmtree(out)
    copy = size / min(copies)
    print(f"{size / 1e9:.2f} GB of bf16, {os.cpu_count()} cores; copy {copy / 1e9:.2f} GB/s, synced")
    for form, turns in found.items():
        speed = size / min(turn["seconds"] for turn in turns)
        peak = max(turn["peak"] for turn in turns)
        print(
            f"{form:12} {speed / 1e9:.2f} GB/s of bf16, {speed / copy:.2f} of copy, "
            f"peak {peak / 1e9:.2f} GB; "
            f"{FULL_BYTES / 1e9:.0f} GB would take {FULL_BYTES / speed / 60:.0f} min"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--once"]:
        convert_once(*sys.argv[2:])
    else:
        with tempfile.TemporaryDirectory(dir=sys.argv[1] if sys.argv[1:] else None) as made:
            main(Path(made))
