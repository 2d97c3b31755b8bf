"""Is this the machine that a GPU bundle was built for? Asked before anything of it is loaded."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from typing import TYPE_CHECKING

from step35_trt.bundle import check_versions, finish_command
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


def check_gpu(bundle: Bundle) -> None:
    """See that the GPUs here are those that a bundle is for.

    Raises:
        UnsupportedError: there is none, the first is another, or there are too few.
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
    fit = [str(device) for device, capability in enumerate(here) if capability == wanted]
    if len(fit) < engine.devices:
        raise UnsupportedError(
            f"{bundle.directory} is shared by {engine.devices} GPUs, and this machine has {len(fit)} of the "
            "kind",
            "step35-trt build-engine CHECKPOINT -o BUNDLE --engine NAME, with an engine for fewer devices",
        )
    if here[: engine.devices] != [wanted] * engine.devices:
        raise UnsupportedError(
            f"{bundle.directory} takes the first {engine.devices} GPUs, and not all of them have compute "
            f"capability {wanted}",
            f"Set CUDA_VISIBLE_DEVICES={','.join(fit[: engine.devices])}",
        )


def check_finished(bundle: Bundle) -> None:
    """See that nothing is left to be made on the target.

    Raises:
        UnsupportedError: something is.
    """
    manifest = bundle.manifest
    if manifest.unfinished:
        assert manifest.engine.hardware is not None
        raise UnsupportedError(
            f"{bundle.directory} is sealed: its {len(manifest.unfinished)} segments are still to be compiled "
            f"on {manifest.engine.hardware.name}",
            f"On that machine run: {finish_command(bundle.directory)}",
        )


def check(bundle: Bundle) -> None:
    """See that this bundle runs here.

    Raises:
        UnsupportedError: it is unfinished, there is no GPU, it is another, a package is missing or of another
            version, or the torch that is installed has no CUDA.
    """
    check_finished(bundle)
    check_gpu(bundle)
    check_versions(bundle.manifest)
    if find_spec("torch") is None:
        raise UnsupportedError(
            f"running {bundle.directory} needs torch", "pip install 'step35-trt[reference]'"
        )
    import torch

    if not torch.cuda.is_available():
        raise UnsupportedError(
            f"{bundle.directory} fits this machine, but torch {torch.__version__} cannot use its GPU",
            "Install torch for CUDA: https://pytorch.org/get-started/locally",
        )


def _capability(engine: str) -> str | None:
    hardware = EngineSpec.load(engine).hardware
    return hardware.compute_capability if hardware else None
