"""Is this the machine that a GPU bundle was built for? Asked before anything of it is loaded."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, NoReturn

from step35_trt.bundle import check_versions
from step35_trt.engine import EngineSpec
from step35_trt.errors import UnsupportedError
from step35_trt.resources import known

if TYPE_CHECKING:
    from step35_trt.bundle import Bundle

MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of CUDA's driver API


def capabilities() -> list[str]:
    """Compute capabilities of the GPUs here, such as `12.1`, as the driver tells them; empty without one."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, number = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return []
    found = []
    for device in range(count.value):
        parts = []
        for attribute in (MAJOR, MINOR):
            cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
            parts.append(str(number.value))
        found.append(".".join(parts))
    return found


def refuse(bundle: Bundle) -> NoReturn:
    """Say why this bundle does not run here.

    Raises:
        UnsupportedError: always; there is no GPU, it is another, a package is of another version, or all fits
            and this version has nothing that runs engines.
    """
    engine, here = bundle.manifest.engine, capabilities()
    assert engine.hardware is not None
    wanted = engine.hardware.compute_capability
    if not here:
        raise UnsupportedError(
            f"{bundle.directory} runs on {engine.hardware.name}, and this machine has no NVIDIA GPU",
            f"Check it here with: step35-trt verify {bundle.directory} --reference CHECKPOINT",
        )
    if wanted not in here:
        fitting = [name for name in known("engines") if _capability(name) in here]
        name = fitting[0] if fitting else "FILE.yaml"
        raise UnsupportedError(
            f"{bundle.directory} is compiled for compute capability {wanted}, the GPU here has {here[0]}",
            f"step35-trt build-engine CHECKPOINT -o BUNDLE --engine {name}",
        )
    check_versions(bundle.manifest)
    raise UnsupportedError(
        f"{bundle.directory} fits this machine, but this version builds and checks engines for "
        f"{engine.target} and does not run them",
        "Run a CPU engine, such as cpu-int4.",
    )


def _capability(engine: str) -> str | None:
    hardware = EngineSpec.load(engine).hardware
    return hardware.compute_capability if hardware else None
