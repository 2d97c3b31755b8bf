"""A bundle's compiled kernels on the device that runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from step35_trt.bundle import rebuild
from step35_trt.kernels.cubins import open_cubins
from step35_trt.kernels.driver import CudaDriver
from step35_trt.kernels.jit import JIT
from step35_trt.program import SteppedProgram

if TYPE_CHECKING:
    from step35_trt.bundle import Bundle
    from step35_trt.deployment import Deployment
    from step35_trt.kernels.launching import Launcher


def bundle_launcher(bundle: Bundle, deployment: Deployment, device: torch.device) -> Launcher:
    """What launches the kernels of a bundle, every one of them loaded; where there is no GPU, Triton's own.

    Args:
        bundle: Opened.
        deployment: What it was made from, which says what a session can need.
        device: Where it runs.

    Raises:
        UnsupportedError: a kernel is missing or another than this version launches, or so is `cuda-bindings`.
        CorruptInputError: a kernel is not what the bundle says.
    """
    if device.type != "cuda":
        return JIT
    assert isinstance(bundle.program, SteppedProgram)
    index = torch.cuda.current_device() if device.index is None else device.index
    return open_cubins(
        bundle.directory,
        bundle.program.kernels,
        deployment.kernels(),
        deployment.target,
        CudaDriver(index),
        lambda: torch.cuda.current_stream(index).cuda_stream,
        rebuild(bundle.directory, bundle.manifest),
    )
