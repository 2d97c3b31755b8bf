"""Speed and memory at real width: four layers of Step 3.5 Flash, one of each kind, int4, on the CPU.

Writes a synthetic checkpoint (random weights, official FP8 layout, 12.5 GB), builds it for `cpu-int4`
and decodes 1, 4 and 64 tokens in rounds. After each round memory is read once, so that both meet the same
moments of a shared machine. With `--peer PYTHON` the same slice runs in llama.cpp (`peer_llama_cpp.py`) right
after.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.bandwidth import Reader
from step35_trt.bundle import forget, sync
from step35_trt.checkpoint import expected_tensors
from step35_trt.config import Step35Config

CALLS = {1: 4, 4: 2, 64: 1}  # of a round, by tokens; the peer's are the same
WARM_UP = 2  # rounds
CONTEXT = 64  # tokens already in the caches
BLOCK = 128


def slice_config() -> dict[str, Any]:
    """`config.json` of the slice: full+dense, window+dense, window+MoE, full+MoE; no MTP."""
    full = [True, False, False, True]
    return {
        "model_type": "step3p5",
        "vocab_size": 128896,
        "hidden_size": 4096,
        "intermediate_size": 11264,
        "num_hidden_layers": 4,
        "num_nextn_predict_layers": 0,
        "num_attention_heads": 64,
        "num_attention_groups": 8,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "attention_other_setting": {
            "attention_type": "sliding_attention",
            "num_attention_heads": 96,
            "num_attention_groups": 8,
            "head_dim": 128,
        },
        "use_head_wise_attn_gate": True,
        "layer_types": ["full_attention" if f else "sliding_attention" for f in full],
        "sliding_window": 512,
        "rope_theta": [5e6 if f else 1e4 for f in full],
        "partial_rotary_factors": [0.5 if f else 1.0 for f in full],
        "use_moe": True,
        "moe_layers_enum": "2,3",
        "moe_num_experts": 288,
        "moe_top_k": 8,
        "moe_intermediate_size": 1280,
        "share_expert_dim": 1280,
        "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": 3.0,
        "use_moe_router_bias": True,
        "norm_expert_weight": True,
        "need_fp32_gate": True,
        "swiglu_limits": [0, 0, 0, 7],
        "swiglu_limits_shared": [0, 0, 0, 16],
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]},
    }


def write_slice(directory: Path) -> None:
    """Stream the random checkpoint; each tensor repeats a random megabyte, shifted so that rows differ."""
    directory.mkdir(parents=True)
    raw = slice_config()
    (directory / "config.json").write_text(json.dumps(raw))
    rng = np.random.default_rng(0)
    pattern = rng.normal(0, 1, (1 << 20) + 7).astype(np.float32)
    as_bf16 = (pattern * 0.02).astype(ml_dtypes.bfloat16).view(np.uint8).tobytes()
    as_fp8 = (pattern * 64).astype(ml_dtypes.float8_e4m3fn).view(np.uint8).tobytes()
    header, offset, plan = {}, 0, []
    for name, shape in expected_tensors(Step35Config.parse(raw)).items():
        expert = len(shape) == 3
        size = int(np.prod(shape)) * (1 if expert else 2)
        header[name] = {
            "dtype": "F8_E4M3" if expert else "BF16",
            "shape": shape,
            "data_offsets": [offset, offset + size],
        }
        plan.append((size, as_fp8 if expert else as_bf16))
        offset += size
        if expert:
            blocks = (shape[0], -(-shape[1] // BLOCK), -(-shape[2] // BLOCK))
            scales = np.full(blocks, 0.02 / 64, np.float32).tobytes()
            header[f"{name}_scale_inv"] = {
                "dtype": "F32",
                "shape": blocks,
                "data_offsets": [offset, offset + len(scales)],
            }
            plan.append((len(scales), scales))
            offset += len(scales)
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for size, content in plan:
            for _ in range(size // len(content)):
                stream.write(content)
            stream.write(content[: size % len(content)])


def measure(bundle: Path) -> None:
    """Decode a round for each line of the standard input; times in ms, the process's peak memory in bytes."""
    from step35_trt.bundle import Bundle
    from step35_trt.program import Program
    from step35_trt.runtime.load import open_session

    opened = Bundle.open(bundle)
    session = open_session(opened)
    rng = np.random.default_rng(1)
    started = time.perf_counter()
    sequence = session.open()
    sequence.decode(rng.integers(0, 128896, CONTEXT), np.array([CONTEXT - 1]))
    load = time.perf_counter() - started
    assert isinstance(opened.program, Program)
    weights = sum(r.size for n, r in opened.manifest.files.items() if n.startswith("weights/"))
    for _ in sys.stdin:
        times: dict[int, list[float]] = {count: [] for count in CALLS}
        for count, calls in CALLS.items():
            for _ in range(calls):
                ids = rng.integers(0, 128896, count)
                started = time.perf_counter()
                sequence.decode(ids, np.array([count - 1]))
                times[count].append((time.perf_counter() - started) * 1e3)
                sequence.truncate(CONTEXT)
        result = {
            "ms": times,
            "bytes_per_token": opened.program.decoder[0].bytes_per_token,
            "weight_bytes": weights,
            "peak_rss": peak_rss(),
            "first_call_seconds": load,
        }
        print(json.dumps(result), flush=True)


def peak_rss() -> int:
    """Peak resident memory of this process, bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/cpu-slice"), help="kept for the next run")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--peer", help="python of an environment with llama-cpp-python")
    parser.add_argument("--gguf", type=Path, help="where the peer keeps its file")
    parser.add_argument("--stage", choices=["build", "run"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    checkpoint, bundle = options.work / "checkpoint", options.work / "bundle"
    if options.stage == "build":
        from step35_trt.build import build
        from step35_trt.engine import EngineSpec

        started = time.perf_counter()
        build(checkpoint, bundle, EngineSpec.load("cpu-int4"))
        print(json.dumps({"seconds": round(time.perf_counter() - started, 1), "peak_rss": peak_rss()}))
        return
    if options.stage == "run":
        measure(bundle)
        return
    if not bundle.exists():
        if not checkpoint.exists():
            partial = checkpoint.with_name("checkpoint.writing")
            shutil.rmtree(partial, ignore_errors=True)
            write_slice(partial)
            partial.rename(checkpoint)
        done = subprocess.run(_stage("build", options), check=True, stdout=subprocess.PIPE, text=True)
        built = json.loads(done.stdout)
        print(f"build: {built['seconds']} s, peak RSS {built['peak_rss'] / 1e9:.2f} GB (budget 2)")
    ours, rates = decode(options)
    peer = _peer(options)
    best, median = max(rates) / 1e9, float(np.median(rates)) / 1e9
    print(f"{platform.machine()}, {os.cpu_count()} cores, reads {best:.1f} GB/s (median {median:.1f})")
    for count, times in ours["ms"].items():
        low, middle = min(times), float(np.median(times))
        line = f"{count:>3} tokens: {low:.1f} ms (median {middle:.1f})"
        if count == "1":
            megabytes = ours["bytes_per_token"] / 1e6
            line += f", {megabytes:.0f} MB read, {megabytes / low / best:.3f} of the bandwidth"
            line += f" (medians {megabytes / middle / median:.3f})"
        if peer:
            other = peer[count]
            line += f"; llama.cpp {other['ms_min']:.1f} ms (median {other['ms_median']:.1f})"
            line += f", ratio {low / other['ms_min']:.2f}"
        print(line)
    budget = 1.15 * ours["weight_bytes"] + 300e6
    print(
        f"weights {ours['weight_bytes'] / 1e9:.2f} GB, peak RSS {ours['peak_rss'] / 1e9:.2f} GB "
        f"(budget {budget / 1e9:.2f}), first call {ours['first_call_seconds']:.2f} s"
    )


def _stage(name: str, options: argparse.Namespace) -> list[str]:
    """A process of its own, so that its peak memory is its own."""
    command = [sys.executable, "-m", "benchmarks.cpu_slice", "--stage", name]
    return [*command, "--work", str(options.work)]


def decode(options: argparse.Namespace) -> tuple[dict[str, Any], list[float]]:
    """What the rounds took, and how fast memory was read after each, in bytes/s."""
    for path in (options.work / "bundle/weights").iterdir():
        _from_disk(path)
    reader, rounds, rates = Reader(), list[dict[str, Any]](), list[float]()
    pipe = subprocess.PIPE
    with subprocess.Popen(_stage("run", options), stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(options.rounds + WARM_UP):
            print(file=process.stdin, flush=True)
            rounds.append(json.loads(process.stdout.readline()))
            rates.append(reader.rate())
        process.stdin.close()
    times = {str(count): [ms for r in rounds[WARM_UP:] for ms in r["ms"][str(count)]] for count in CALLS}
    return rounds[-1] | {"ms": times}, rates[WARM_UP:]


def _from_disk(path: Path) -> None:
    """Let the next reader of a file read it from the disk, as after a restart.

    Pages of a file that was written while memory was short lie apart from each other, and reading those takes
    up to a tenth longer, whoever reads.
    """
    sync(path)
    forget(path)


def _peer(options: argparse.Namespace) -> dict[str, Any] | None:
    if not options.peer:
        return None
    gguf = options.gguf or options.work / "slice.gguf"
    if gguf.exists():
        _from_disk(gguf)
    script = Path(__file__).with_name("peer_llama_cpp.py")
    command = [options.peer, str(script), "--gguf", str(gguf), "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
