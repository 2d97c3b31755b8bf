"""The C of `plugins/` as shared libraries, compiled where they are wanted.

The compiler is zig's C compiler from the wheel `ziglang`: it needs nothing else on the machine, targets any
glibc and writes the same bytes each time. Sources compile once; the result is kept in the user's cache.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from step35_trt.errors import Step35Error, UnsupportedError
from step35_trt.resources import DATA, cache_folder

TARGETS = {"x86_64": "x86_64-linux-gnu.2.28", "aarch64": "aarch64-linux-gnu.2.28"}
# Fused multiply-adds are written where they are meant: results must not depend on the instruction set.
COMPILE = ["-std=c11", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-w"]
LINK = ["-shared", "-s", "-Wl,--build-id=none"]


@dataclass(frozen=True)
class Library:
    """A library's name and its sources, as patterns below `plugins/`."""

    name: str
    patterns: tuple[str, ...]

    def sources(self) -> list[Path]:
        """C files and headers, in an order of their own."""
        root = DATA / "plugins"
        return sorted(path for pattern in self.patterns for path in root.glob(pattern))


FOLDERS = ("chain", "cpu", "gated_attention", "int4_linear", "sparse_moe")
OPERATORS = Library("cpu", tuple(f"{folder}/*.[ch]" for folder in FOLDERS))
# Quantising; it runs where a checkpoint is converted and is no part of a bundle.
CONVERTER = Library("convert", ("convert/*.[ch]", "cpu/isa.[ch]"))


def compile_library(out: Path, target: str = platform.machine()) -> None:
    """Write the CPU operators for `target` ("x86_64" or "aarch64") to `out`.

    Raises:
        UnsupportedError: another target.
        Step35Error: there is no compiler, or it fails.
        OSError: `out` or the cache cannot be written.
    """
    cached = compiled(OPERATORS, target)
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(cached, out)


def compiled(library: Library, target: str = platform.machine()) -> Path:
    """The library in the user's cache, compiled if it is not there.

    Raises:
        UnsupportedError: another target.
        Step35Error: there is no compiler, or it fails.
        OSError: the cache cannot be written.
    """
    if target not in TARGETS:
        raise UnsupportedError(f"there are no CPU operators for {target}", f"Known: {', '.join(TARGETS)}.")
    cached = cache_folder() / f"step35-{library.name}-{target}-{_digest(library, target)}.so"
    if not cached.is_file():
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent) as folder:
            _compile(library, Path(folder), TARGETS[target]).replace(cached)
    return cached


@functools.cache
def _digest(library: Library, target: str) -> str:
    digest = hashlib.sha256(repr((_compiler(), TARGETS[target], COMPILE, LINK)).encode())
    for path in library.sources():
        digest.update(f"\0{path.parent.name}/{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:24]


def _compiler() -> str:
    try:
        return version("ziglang")
    except PackageNotFoundError:
        raise Step35Error(
            "the CPU operators cannot be compiled: the package ziglang is missing", "pip install ziglang"
        ) from None


def _compile(library: Library, folder: Path, target: str) -> Path:
    """Sources compile side by side. They are named relative to their root, which leaves no path behind."""
    root = DATA / "plugins"
    names = [str(path.relative_to(root)) for path in library.sources() if path.suffix == ".c"]
    objects = [str(folder / name.replace("/", "-").replace(".c", ".o")) for name in names]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        jobs = [
            pool.submit(_zig, [*COMPILE, "-target", target, "-c", name, "-o", made], folder)
            for name, made in zip(names, objects, strict=True)
        ]
        for job in jobs:
            job.result()
    made = folder / "library.so"
    _zig([*LINK, "-target", target, *objects, "-lm", "-o", str(made)], folder)
    return made


def _zig(arguments: list[str], folder: Path) -> None:
    """What the compiler makes of its own, parts of a C library, it keeps; what it makes of ours, we do."""
    caches = {"ZIG_GLOBAL_CACHE_DIR": cache_folder() / "zig", "ZIG_LOCAL_CACHE_DIR": folder / "zig"}
    command = [sys.executable, "-m", "ziglang", "cc", *arguments]
    done = subprocess.run(
        command,
        cwd=DATA / "plugins",
        env=os.environ | {name: str(path) for name, path in caches.items()},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise Step35Error(
            f"the CPU operators do not compile: {lines[0] if lines else 'the compiler gave up'}"
        )
