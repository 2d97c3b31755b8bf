"""The identity of a compilation: a digest of everything that decides its bytes."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from step35_trt.errors import Step35Error

if TYPE_CHECKING:
    from pathlib import Path

    from step35_trt.kernels.targets import GpuTarget
    from step35_trt.kernels.variant import KernelVariant

FORMAT = 1  # counts up when the compiler's options or the cache's files change


def digest(variant: KernelVariant, target: GpuTarget, root: Path) -> str:
    """Of the kernel's sources, its arguments and constants, the target and Triton's version; 24 digits.

    Names of plugins and variants do not decide any byte and are left out.
    """
    options = {
        "format": FORMAT,
        "triton": triton_version(),
        "target": target.capability,
        "function": variant.function,
        "signature": list(variant.signature.items()),
        "constants": sorted(variant.constants.items()),
        "aligned": sorted(variant.aligned),
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
    }
    result = hashlib.sha256(json.dumps(options).encode())
    for path in sources(root / variant.plugin / f"{variant.module}.py"):
        result.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return result.hexdigest()[:24]


def triton_version() -> str:
    """Of the installed compiler.

    Raises:
        Step35Error: it is not installed.
    """
    try:
        return version("triton")
    except PackageNotFoundError:
        raise Step35Error(
            "GPU kernels cannot be compiled: the package triton is missing",
            "pip install 'step35-trt[kernels]'",
        ) from None


@functools.cache
def sources(module: Path) -> tuple[Path, ...]:
    """`module` and what it imports relatively, directly or not: all code a kernel of it can call.

    Raises:
        Step35Error: there is no such file.
    """
    if not module.is_file():
        raise Step35Error(f"the kernel source {module.parent.name}/{module.name} does not exist")
    found, waiting = {module}, [module]
    while waiting:
        for path in _imported(waiting.pop()):
            if path not in found:
                found.add(path)
                waiting.append(path)
    return tuple(sorted(found))


def _imported(path: Path) -> list[Path]:
    files = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.level:
            place = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            files += [place.with_suffix(".py"), *(place / f"{name.name}.py" for name in node.names)]
    return [file for file in files if file.is_file()]
