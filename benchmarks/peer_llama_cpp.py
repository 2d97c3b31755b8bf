"""llama.cpp on a synthetic four-layer slice of Step 3.5 Flash: the peer of `cpu_slice.py`.

The slice has the published widths, random Q4_0 weights and one layer of each kind: full attention with a
dense FFN, window with dense, window with MoE, full with MoE. It measures speed only: its text is noise.

    python -m venv peer
    CMAKE_ARGS="-DLLAMA_BUILD_TOOLS=OFF" peer/bin/pip install llama-cpp-python==0.3.36 gguf
    peer/bin/python benchmarks/peer_llama_cpp.py --gguf slice.gguf --json
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import mmap
import os
import resource
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

HIDDEN, HEAD_DIM, KV_HEADS, DENSE, VOCAB = 4096, 128, 8, 11264, 128896
EXPERTS, TOP_K, EXPERT = 288, 8, 1280
HEADS = (64, 96, 96, 64)
WINDOW = (False, True, True, False)
FIRST_MOE = 2
PREFILL, CONTEXT = 64, 256
# Tokens of one call, and how many such calls a round holds: the short ones are the noisy ones.
CALLS = {1: 4, 4: 2, 64: 1}
BANDWIDTH_BYTES = 512 << 20
# llama.h: GGML_LOG_LEVEL_ERROR, LLAMA_LOAD_MODE_NONE, LLAMA_LOAD_MODE_MMAP.
LOG_ERROR, LOAD_READ, LOAD_MAPPED = 4, 0, 1
BLOCK, BLOCK_BYTES = 32, 18  # Q4_0: an fp16 scale and 32 nibbles


class PeerError(Exception):
    """What stops the measurement, in one sentence for the user."""


def tensors() -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, rows before columns; llama.cpp keeps vectors and the router in fp32."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, HIDDEN)}
    kv = KV_HEADS * HEAD_DIM
    for i, heads in enumerate(HEADS):
        layer: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (HIDDEN,),
            "attn_q.weight": (heads * HEAD_DIM, HIDDEN),
            "attn_k.weight": (kv, HIDDEN),
            "attn_v.weight": (kv, HIDDEN),
            "attn_q_norm.weight": (HEAD_DIM,),
            "attn_k_norm.weight": (HEAD_DIM,),
            "attn_gate.weight": (heads, HIDDEN),
            "attn_output.weight": (HIDDEN, heads * HEAD_DIM),
            "ffn_norm.weight": (HIDDEN,),
        }
        if i < FIRST_MOE:
            layer |= {
                "ffn_gate.weight": (DENSE, HIDDEN),
                "ffn_up.weight": (DENSE, HIDDEN),
                "ffn_down.weight": (HIDDEN, DENSE),
            }
        else:
            layer |= {
                "ffn_gate_inp.weight": (EXPERTS, HIDDEN),
                "exp_probs_b.bias": (EXPERTS,),
                "ffn_gate_exps.weight": (EXPERTS, EXPERT, HIDDEN),
                "ffn_up_exps.weight": (EXPERTS, EXPERT, HIDDEN),
                "ffn_down_exps.weight": (EXPERTS, HIDDEN, EXPERT),
                "ffn_gate_shexp.weight": (EXPERT, HIDDEN),
                "ffn_up_shexp.weight": (EXPERT, HIDDEN),
                "ffn_down_shexp.weight": (HIDDEN, EXPERT),
            }
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    return shapes | {"output_norm.weight": (HIDDEN,), "output.weight": (VOCAB, HIDDEN)}


def is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and "ffn_gate_inp" not in name


def tensor_bytes(name: str, shape: tuple[int, ...]) -> int:
    elements = math.prod(shape)
    return elements // BLOCK * BLOCK_BYTES if is_quantized(name, shape) else elements * 4


def bytes_read(tokens: int) -> int:
    """Weight bytes that one call over `tokens` tokens reads once; experts as uniform routing picks them."""
    picked = EXPERTS * (1 - (1 - TOP_K / EXPERTS) ** tokens)
    total = 0.0
    for name, shape in tensors().items():
        size = tensor_bytes(name, shape)
        if name == "token_embd.weight":
            size = size // VOCAB * tokens
        total += size * picked / EXPERTS if "_exps." in name else size
    return int(total)


def values(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Random content that keeps activations near unit size: Q4_0 as bytes, the rest as fp32."""
    if not is_quantized(name, shape):
        if len(shape) > 1:
            return rng.standard_normal(shape, np.float32) / np.float32(math.sqrt(shape[-1]))
        return np.zeros(shape, np.float32) if name.endswith(".bias") else np.ones(shape, np.float32)
    row = shape[-1] // BLOCK * BLOCK_BYTES
    blocks = np.frombuffer(rng.bytes(math.prod(shape[:-1]) * row), np.uint8).reshape(-1, BLOCK_BYTES).copy()
    # A nibble is uniform over -8..7, of deviation 4.6.
    scale = rng.uniform(0.75, 1.25, len(blocks)) / (4.6 * math.sqrt(shape[-1]))
    blocks[:, :2] = scale.astype("<f2").view(np.uint8).reshape(-1, 2)
    return blocks.reshape(*shape[:-1], row)


def describe(writer: Any, gguf: Any) -> None:
    writer.add_name("Step 3.5 Flash slice, random weights")
    writer.add_context_length(4096)
    writer.add_block_count(len(HEADS))
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(DENSE)
    writer.add_head_count(list(HEADS))
    writer.add_head_count_kv([KV_HEADS] * len(HEADS))
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(5e6)
    writer.add_rope_freq_base_swa(1e4)
    writer.add_sliding_window(512)
    writer.add_sliding_window_pattern(list(WINDOW))
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(TOP_K)
    writer.add_expert_feed_forward_length(EXPERT)
    writer.add_expert_shared_feed_forward_length(EXPERT)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_scale(3.0)
    writer.add_expert_weights_norm(True)
    writer.add_leading_dense_block_count(FIRST_MOE)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(VOCAB)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)


def write_slice(path: Path) -> None:
    """Write the slice to `path`, one tensor in memory at a time."""
    try:
        import gguf
    except ImportError:
        raise PeerError("gguf is missing; install it into this Python: pip install gguf") from None
    shapes = tensors()
    need = sum(tensor_bytes(name, shape) for name, shape in shapes.items())
    free = shutil.disk_usage(path.parent).free
    if free < need * 1.05:
        raise PeerError(f"{path.parent} has {free / 1e9:.1f} GB free; the slice takes {need / 1e9:.1f} GB")
    part = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(part, "step35")
    describe(writer, gguf)
    kinds = gguf.GGMLQuantizationType
    for name, shape in shapes.items():
        quantized = is_quantized(name, shape)
        # An fp32 dtype keeps `shape` in elements; uint8 would make the writer read it in bytes.
        writer.add_tensor_info(
            name,
            shape,
            np.dtype(np.float32),
            tensor_bytes(name, shape),
            raw_dtype=kinds.Q4_0 if quantized else kinds.F32,
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        rng = np.random.default_rng(0)
        for name, shape in shapes.items():
            writer.write_tensor_data(values(name, shape, rng))
        writer.close()
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_bandwidth(threads: int) -> float:
    """The best rate in GB/s at which `threads` threads read memory they do not share.

    memchr reads every byte once with the widest loads that libc has, and ctypes lets threads overlap.
    """
    memchr = ctypes.CDLL(None).memchr
    memchr.argtypes, memchr.restype = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], ctypes.c_void_p
    share = BANDWIDTH_BYTES // threads
    best = 0.0
    with mmap.mmap(-1, BANDWIDTH_BYTES) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        view = np.frombuffer(memory, np.uint8)
        view[:] = 1
        start = view.ctypes.data
        for _ in range(12):
            readers = [
                threading.Thread(target=memchr, args=(start + i * share, 0, share)) for i in range(threads)
            ]
            begin = time.perf_counter()
            for reader in readers:
                reader.start()
            for reader in readers:
                reader.join()
            best = max(best, share * threads / (time.perf_counter() - begin) / 1e9)
        del view
    return best


def load_library() -> Any:
    try:
        import llama_cpp
    except ImportError:
        raise PeerError(
            "llama_cpp is missing; install it into this Python: "
            'CMAKE_ARGS="-DLLAMA_BUILD_TOOLS=OFF" pip install llama-cpp-python==0.3.36 gguf'
        ) from None
    except (OSError, RuntimeError) as error:
        raise PeerError(f"llama_cpp does not load: {error}") from None
    return llama_cpp


def assign(parameters: Any, **options: int | bool) -> None:
    """Set fields of a C structure; an unknown one would become a Python attribute that nothing reads."""
    known = {field[0] for field in parameters._fields_}
    if missing := sorted(options.keys() - known):
        raise PeerError(f"this llama_cpp has no option {', '.join(missing)}; install llama-cpp-python 0.3.36")
    for name, value in options.items():
        setattr(parameters, name, value)


class Session:
    """A context over the slice that decodes calls of a given length after the same prefill."""

    def __init__(self, path: Path, threads: int, repack: bool, use_mmap: bool) -> None:
        llama_cpp = self.lib = load_library()
        messages: list[str] = []

        def log(level: int, text: bytes, _data: Any) -> None:
            if level == LOG_ERROR:
                messages.append(text.decode("utf-8", "replace").strip())

        self._log: Any = llama_cpp.llama_log_callback(log)  # llama.cpp holds no reference to it
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        assign(
            model_params,
            n_gpu_layers=0,
            use_extra_bufts=repack,
            load_mode=LOAD_MAPPED if use_mmap else LOAD_READ,
        )
        model = llama_cpp.llama_model_load_from_file(os.fsencode(path), model_params)
        if not model:
            raise PeerError(f"llama.cpp cannot load {path}: {'; '.join(messages) or 'no reason given'}")
        params = llama_cpp.llama_context_default_params()
        assign(params, n_ctx=CONTEXT, n_batch=PREFILL, n_ubatch=PREFILL)
        assign(params, n_threads=threads, n_threads_batch=threads)
        self._context: Any = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise PeerError(f"llama.cpp cannot make a context: {'; '.join(messages) or 'no reason given'}")
        self._rng = np.random.default_rng(1)
        self.wall = self.busy = 0.0
        self.decode(PREFILL)

    def decode(self, count: int) -> float:
        """Decode `count` random tokens in one call, read the last logits, and return the seconds."""
        lib = self.lib
        tokens = (lib.llama_token * count)(*self._rng.integers(0, VOCAB, count).tolist())
        begin, busy = time.perf_counter(), time.process_time()
        # A batch of this kind asks for the logits of its last token only; reading them waits for them.
        code = lib.llama_decode(self._context, lib.llama_batch_get_one(tokens, count))
        logits = lib.llama_get_logits_ith(self._context, -1) if code == 0 else None
        seconds = time.perf_counter() - begin
        self.wall, self.busy = self.wall + seconds, self.busy + time.process_time() - busy
        if code or not logits:
            raise PeerError(f"llama_decode of {count} tokens answers {code}")
        if not np.isfinite(np.ctypeslib.as_array(logits, (VOCAB,))).all():
            raise PeerError("llama.cpp computed logits that are not finite: the GGUF is damaged; delete it")
        return seconds

    def after_prefill(self, count: int) -> float:
        """Time one call of `count` tokens behind the prefill, and forget them."""
        seconds = self.decode(count)
        lib = self.lib
        if not lib.llama_memory_seq_rm(lib.llama_get_memory(self._context), 0, PREFILL, -1):
            raise PeerError("llama.cpp cannot remove the decoded tokens from its cache")
        return seconds


def resident() -> dict[str, float]:
    """Peak resident GB, and what of the present ones is memory of its own rather than the mapped file."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    status = Path("/proc/self/status").read_text(encoding="ascii")
    anon = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:"))
    return {"rss_peak_gb": round(peak, 2), "rss_anon_gb": round(anon * 1024 / 1e9, 2)}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    if sys.platform != "linux":
        raise PeerError("memory and bandwidth are measured as Linux reports them; this is not Linux")
    path: Path = arguments.gguf
    load_library()  # before the slice is written for nothing
    weights = sum(tensor_bytes(name, shape) for name, shape in tensors().items())
    if not path.exists():
        print(f"writing {path} ({weights / 1e9:.1f} GB)", file=sys.stderr)
        write_slice(path)
    size = path.stat().st_size
    if not 0 <= size - weights < 1 << 20:
        raise PeerError(f"{path} has {size} bytes and is not this slice; delete it or name another path")
    before = read_bandwidth(arguments.threads)
    session = Session(path, arguments.threads, not arguments.no_repack, not arguments.no_mmap)
    taken: dict[int, list[float]] = {count: [] for count in CALLS}
    for repeat in range(arguments.rounds + 2):  # the first two warm up
        if repeat == 2:
            session.wall = session.busy = 0.0
        for count, calls in CALLS.items():
            seconds = [session.after_prefill(count) for _ in range(calls)]
            if repeat >= 2:
                taken[count] += seconds
    memory = resident()
    bandwidth = max(before, read_bandwidth(arguments.threads))
    result: dict[str, Any] = {
        "peer": f"llama-cpp-python {session.lib.__version__}",
        "system": session.lib.llama_print_system_info().decode().strip(),
        "threads": arguments.threads,
        "repack": not arguments.no_repack,
        "mmap": not arguments.no_mmap,
        "file_bytes": size,
        **memory,
        "read_gb_s": round(bandwidth, 1),
        # Its threads spin while they wait: well under 1, something else had the cores.
        "cpu_share": round(session.busy / (session.wall * arguments.threads), 2),
    }
    summary: dict[str, Callable[[list[float]], Any]] = {"ms_min": np.min, "ms_median": np.median}
    for count, seconds in taken.items():
        row = {name: round(float(reduce(seconds)) * 1e3, 2) for name, reduce in summary.items()}
        rate = bytes_read(count) / (row["ms_min"] / 1e3) / 1e9
        result[str(count)] = {
            **row,
            "calls": len(seconds),
            "weight_bytes": bytes_read(count),
            "gb_s": round(rate, 1),
            "of_read": round(rate / bandwidth, 2),
        }
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gguf", type=Path, default=Path("build/peer-slice.gguf"), help="written if missing")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--rounds",
        type=int,
        default=20,
        help="each of "
        + ", ".join(f"{calls} call{'s' * (calls > 1)} of {count}" for count, calls in CALLS.items()),
    )
    parser.add_argument("--no-repack", action="store_true", help="keep Q4_0 as it is in the file")
    parser.add_argument("--no-mmap", action="store_true", help="read the file instead of mapping it")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    arguments = parser.parse_args()
    if arguments.threads < 1 or arguments.rounds < 1:
        parser.error("--threads and --rounds are at least 1")
    try:
        arguments.gguf.parent.mkdir(parents=True, exist_ok=True)
        result = measure(arguments)
    except (PeerError, OSError) as error:
        print(f"peer_llama_cpp: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(result))
        return 0
    for count in CALLS:
        row = result[str(count)]
        print(
            f"{count:>3} tokens: min {row['ms_min']:.1f} ms, median {row['ms_median']:.1f} ms, "
            f"weights at {row['gb_s']} GB/s, {row['of_read']:.0%} of a plain read"
        )
    print(f"it had {result['cpu_share']:.0%} of {result['threads']} cores")
    print(f"peak RSS {result['rss_peak_gb']} GB; file {result['file_bytes'] / 1e9:.2f} GB; {result['peer']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
