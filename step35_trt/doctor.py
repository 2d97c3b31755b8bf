"""What this machine has, as far as it matters here."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@dataclass(frozen=True)
class Finding:
    """One fact and what follows from it."""

    what: str
    found: str
    means: str


PACKAGES = {
    "onnxruntime": "runs CPU bundles",
    "torch": "verify and logits on a checkpoint",
    "nvidia-modelopt": "calibrated quantisation",
    "triton": "GPU kernels compiled ahead of time",
    "tensorrt-rtx-cu13": "engines for DGX Spark: builds and runs them",
    "tensorrt": "engines for Hopper: finishes and runs them",
    "cuda-bindings": "launches the kernels of GPU bundles",
}


def examine() -> list[Finding]:
    """Look at the machine without importing any back end."""
    findings = [
        Finding("machine", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores", ""),
        Finding("memory", f"{_memory() / 1e9:.0f} GB", "a CPU bundle needs about its weights' size"),
        Finding("disk here", f"{shutil.disk_usage(Path.cwd()).free / 1e9:.0f} GB free", "room for bundles"),
        Finding("integer dot products", _dot_products(), "int4 speed on the CPU"),
        Finding("NVIDIA driver", _driver(), "needed to run, not to build, GPU bundles"),
    ]
    return findings + [Finding(name, _version(name), means) for name, means in PACKAGES.items()]


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _dot_products() -> str:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    for flag in ("avx512_vnni", "avx_vnni", "asimddp", "avx2"):
        if flag in flags:
            return flag
    return "none"


def _driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    return path.read_text(encoding="utf-8").splitlines()[0] if path.exists() else "none"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
