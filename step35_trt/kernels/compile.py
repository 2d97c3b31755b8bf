"""Kernels compiled ahead of time: in parallel, without a GPU or a driver, kept in the user's cache."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from step35_trt.errors import Step35Error
from step35_trt.kernels import content, ptx
from step35_trt.kernels.artefact import (
    CUBIN,
    FACTS,
    PTX,
    SCRATCH,
    Argument,
    CompiledKernel,
    Facts,
    Launch,
    Resources,
    read,
)
from step35_trt.kernels.artefact import digest as file_digest
from step35_trt.kernels.plugin import ROOT
from step35_trt.progress import silent
from step35_trt.resources import cache_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from step35_trt.kernels.targets import GpuTarget
    from step35_trt.kernels.variant import KernelVariant
    from step35_trt.progress import Progress

_PTX_TYPES = {"i1": "u8", "i8": "u8", "u8": "u8", "i16": "u16", "i32": "u32", "u32": "u32", "i64": "u64"}
_PTX_TYPES |= {"u64": "u64", "fp32": "f32", "fp64": "f64"}
_LOG = {
    "registers": re.compile(r"Used (\d+) registers"),
    "stack_bytes": re.compile(r"(\d+) bytes stack frame"),
    "spill_store_bytes": re.compile(r"(\d+) bytes spill stores"),
    "spill_load_bytes": re.compile(r"(\d+) bytes spill loads"),
}


def compile_kernels(
    variants: Sequence[KernelVariant],
    target: GpuTarget,
    *,
    root: Path = ROOT,
    workers: int | None = None,
    progress: Progress = silent,
) -> list[CompiledKernel]:
    """Compile `variants` for `target`, in their order; what the cache holds is not compiled again.

    The bytes depend on the kernels' sources, their options and Triton's version alone. `workers` processes
    (absent: one a core) compile side by side; kernels of equal content are compiled once.

    Raises:
        Step35Error: a kernel does not compile, or there is no compiler.
        OSError: the cache cannot be written.
    """
    folders = [cache_folder() / "kernels" / content.digest(variant, target, root) for variant in variants]
    jobs = dict(zip(folders, variants, strict=True))
    board = _Board(len(jobs), progress)
    ready = {folder: kernel for folder, v in jobs.items() if (kernel := read(folder, v, target))}
    for folder in ready:
        board.done(jobs[folder])
    missing = [(folder, variant) for folder, variant in jobs.items() if folder not in ready]
    if missing:
        queue: SimpleQueue[tuple[Path, KernelVariant]] = SimpleQueue()
        for job in missing:
            queue.put(job)
        count = min(workers or os.cpu_count() or 1, len(missing))
        cache_folder().joinpath("kernels").mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(count) as pool:
            for running in [pool.submit(_drain, queue, board, target, root) for _ in range(count)]:
                running.result()
    results = []
    for folder, variant in zip(folders, variants, strict=True):
        kernel = read(folder, variant, target)
        if kernel is None:
            raise Step35Error(f"the kernel cache {folder} cannot be read back")
        results.append(kernel)
    return results


@dataclass
class _Board:
    """Counts what is done, for all workers together."""

    total: int
    progress: Progress
    failed: bool = False
    _count: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def done(self, variant: KernelVariant) -> None:
        with self._lock:
            self._count += 1
            self.progress(self._count, self.total, f"{variant.plugin}/{variant.name}")


def _drain(
    queue: SimpleQueue[tuple[Path, KernelVariant]], board: _Board, target: GpuTarget, root: Path
) -> None:
    """Compile from the queue until it is empty or another worker has failed."""
    with tempfile.TemporaryDirectory(dir=cache_folder() / "kernels", prefix=".work-") as work:
        process = _Process(Path(work))
        try:
            while not board.failed:
                folder, variant = queue.get_nowait()
                made = Path(tempfile.mkdtemp(dir=work))
                _compile(process, made, variant, target, root)
                _place(made, folder)
                board.done(variant)
        except Empty:
            pass
        except BaseException:
            board.failed = True
            raise
        finally:
            process.close()


class _Process:
    """A worker process and its standard streams."""

    def __init__(self, work: Path) -> None:
        """Start it with Triton's settings at their defaults, so that the environment decides no byte."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
        environment |= {
            "TRITON_CACHE_DIR": str(work / "triton"),
            "TRITON_DISABLE_LINE_INFO": "1",  # line info would name this machine's folders
            "TRITON_DUMP_PTXAS_LOG": "1",
            "TMPDIR": str(work),
        }
        self._messages = (work / "messages").open("w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "step35_trt.kernels.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            env=environment,
            text=True,
            encoding="utf-8",
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request, one answer; `error` where the compiler fails or takes the process down."""
        self._messages.seek(0)
        self._messages.truncate()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the compiler stopped"}
        if "error" in answer:
            answer["error"] = self._complaint() or answer["error"]
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._messages.close()

    def _complaint(self) -> str:
        """The first line of the compiler's own messages that names an error."""
        self._messages.seek(0)
        lines = (line.strip() for line in self._messages)
        return next((line for line in lines if re.search(r"\berror\b|Assertion|LLVM ERROR", line)), "")


def _compile(process: _Process, folder: Path, variant: KernelVariant, target: GpuTarget, root: Path) -> None:
    request = {
        "plugin": variant.plugin,
        "module": variant.module,
        "function": variant.function,
        "signature": dict(variant.signature),
        "constants": dict(variant.constants),
        "aligned": list(variant.aligned),
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "capability": target.capability,
        "root": str(root),
        "folder": str(folder),
    }
    answer = process.ask(request)
    if "error" in answer:
        raise Step35Error(
            f"{variant.plugin}: the kernel {variant.name} does not compile for {target.name}: "
            f"{answer['error']}"
        )
    arguments = tuple(Argument(name=name, type=kind) for name, kind in answer["arguments"]) + SCRATCH
    content_of = {name: (folder / name).read_bytes() for name in (PTX, CUBIN)}
    declared = ptx.entry(content_of[PTX].decode()).types
    expected = tuple("u64" if a.type.startswith("*") else _PTX_TYPES.get(a.type, "?") for a in arguments)
    if declared != expected:
        raise Step35Error(
            f"{variant.plugin}: {variant.name} takes {declared} where its signature says {expected}"
        )
    facts = Facts(
        target=target.name,
        triton=content.triton_version(),
        launch=Launch(
            entry=answer["entry"],
            arguments=arguments,
            num_warps=answer["num_warps"],
            shared_bytes=answer["shared_bytes"],
            scratch_bytes=answer["scratch_bytes"],
        ),
        resources=_resources(answer["log"]),
        digests={name: file_digest(data) for name, data in content_of.items()},
    )
    (folder / FACTS).write_text(facts.model_dump_json(indent=1) + "\n", encoding="utf-8")


def _resources(log: str) -> Resources:
    found = {name: [int(number) for number in pattern.findall(log)] for name, pattern in _LOG.items()}
    missing = [name for name, numbers in found.items() if not numbers]
    if missing:
        raise Step35Error(f"the assembler's report does not say {missing[0]}")
    return Resources(**{name: max(numbers) for name, numbers in found.items()})


def _place(made: Path, folder: Path) -> None:
    """Move a finished folder to its address; another process may have been first, or left a damaged one."""
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        folder.rename(made.parent / f"replaced-{folder.name}")
        made.rename(folder)
