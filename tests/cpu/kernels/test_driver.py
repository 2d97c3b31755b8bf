"""What CUDA's driver is asked for, through the very bindings, over a library that only writes it down."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from step35_trt import cpu_library

pytest.importorskip("cuda.bindings")

SOURCE = Path(__file__).with_name("fake_cuda.c")
PROGRAM = """
from step35_trt.errors import Step35Error
from step35_trt.kernels.driver import CudaDriver

try:
    driver = CudaDriver(1)
    plain, wide = (driver.load(b"code", name, shared) for name, shared in (("plain", 49152), ("wide", 49153)))
    driver.launch(wide, (3, 2, 1), 128, 49153, 0xabc, bytes(range(16)))
except Step35Error as error:
    print(type(error).__name__, error.message)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda")
    target = ["-target", cpu_library.TARGETS[platform.machine()]]
    made = ["-fPIC", str(SOURCE), "-o", str(folder / "libcuda.so.1")]
    cpu_library._zig([*cpu_library.LINK, *target, *made], folder)
    return folder


def run(library: Path, log: Path, **more: str) -> tuple[str, list[str]]:
    """What is printed, and what the driver was asked for."""
    environment = os.environ | {"LD_LIBRARY_PATH": str(library), "FAKE_CUDA_LOG": str(log)} | more
    environment |= {"FAKE_CUDA_PARAMETERS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip(), log.read_text().splitlines() if log.exists() else []


def test_a_kernel_is_loaded_and_launched(library: Path, tmp_path: Path) -> None:
    said, asked = run(library, tmp_path / "log")
    assert said == ""
    assert asked == [
        "cuInit 0",
        "cuDeviceGet 1",
        "cuDevicePrimaryCtxRetain 1",
        "cuCtxPushCurrent own",
        "cuModuleLoadData code inside",
        "cuModuleGetFunction 1 plain",
        "cuCtxPopCurrent",
        "cuCtxPushCurrent own",
        "cuModuleLoadData code inside",
        "cuModuleGetFunction 1 wide",
        "cuFuncSetCacheConfig 1 1",  # CU_FUNC_CACHE_PREFER_SHARED
        "cuFuncSetAttribute 1 8 49153",  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        "cuCtxPopCurrent",
        "cuCtxPushCurrent own",
        "cuLaunchKernel 1 inside 3,2,1 128,1,1 49153 abc 0 706050403020100 f0e0d0c0b0a0908",
        "cuCtxPopCurrent",
    ]


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        ("cuModuleLoadData", "CUDA's driver cannot load plain: CUDA_ERROR_NO_BINARY_FOR_GPU"),
        ("cuLaunchKernel", "CUDA's driver cannot launch a kernel: CUDA_ERROR_NO_BINARY_FOR_GPU"),
        ("cuDeviceGet", "CUDA's driver cannot find device 1: CUDA_ERROR_NO_BINARY_FOR_GPU"),
    ],
)
def test_what_the_driver_refuses(library: Path, tmp_path: Path, fails: str, said: str) -> None:
    found, asked = run(library, tmp_path / "log", FAKE_CUDA_FAIL=fails)
    assert found == f"Step35Error {said}"
    entered, left = (sum(line.startswith(word) for line in asked) for word in ("cuCtxPush", "cuCtxPop"))
    assert entered == left


def test_a_machine_without_a_driver(tmp_path: Path) -> None:
    from step35_trt.runtime.gpu import capabilities

    if capabilities():
        pytest.skip("there is one here")
    said, _ = run(tmp_path, tmp_path / "log")
    assert said.startswith("UnsupportedError CUDA's driver cannot be loaded: ")
    assert "\n" not in said
