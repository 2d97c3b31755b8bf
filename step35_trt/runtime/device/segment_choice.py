"""Who runs a bundle's segments: its engines, where they fit this machine, else torch.

Torch computes what the engines were compiled from, on the same weights; so a machine without the library that
an engine needs still runs the bundle, and is told what it does without.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from step35_trt import bundle as bundles
from step35_trt import console
from step35_trt.bundle import DEPENDENCIES, ENGINE_RUNTIMES, check_version
from step35_trt.errors import Step35Error, UnsupportedError
from step35_trt.program import SteppedProgram
from step35_trt.runtime.device.segment_engines import EngineSegments, check_engines
from step35_trt.runtime.device.tensorrt_runtime import Compiled, TensorRtRuntime
from step35_trt.runtime.placement import Placement
from step35_trt.runtime.programs.torch_segments import TorchSegments

if TYPE_CHECKING:
    from step35_trt.bundle import Bundle, Manifest
    from step35_trt.deployment import Deployment
    from step35_trt.runtime.device.device_weights import DeviceWeights
    from step35_trt.runtime.device.engine_runtime import EngineRuntime, LoadedEngine
    from step35_trt.runtime.programs.program_torch import SegmentRunner

# Takes a bundle's manifest and the device.
RuntimeFor = Callable[["Manifest", torch.device], "EngineRuntime"]
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


def installed_runtime(manifest: Manifest, device: torch.device) -> EngineRuntime:
    """The library that a bundle's engines were built with.

    Raises:
        UnsupportedError: it is not here, or of another version, or `device` is no GPU or not theirs.
    """
    if device.type != "cuda":
        raise UnsupportedError("engines need a GPU")
    name = next(iter(DEPENDENCIES[manifest.engine.target].keys() & ENGINE_RUNTIMES))
    have = bundles.versions(manifest.engine.target)[name]
    try:
        trt = importlib.import_module(MODULES[name])
    except (ImportError, OSError):
        check_version(manifest, name, have)
        raise UnsupportedError(f"{name} {have} does not start here") from None
    check_version(manifest, name, str(trt.__version__) if have == "none" else have)
    capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
    hardware = manifest.engine.hardware
    if hardware is None or hardware.compute_capability != capability:
        raise UnsupportedError(f"the engines are not for compute capability {capability}")
    rtx = name == "tensorrt-rtx"
    return TensorRtRuntime(trt, Compiled.of(str(trt.__version__), capability) if rtx else None)


def bundle_segments(
    bundle: Bundle,
    deployment: Deployment,
    weights: DeviceWeights,
    longest: int,
    returning: int,
    runtime_for: RuntimeFor = installed_runtime,
) -> SegmentRunner:
    """A bundle's engines, loaded; torch where they cannot be used, with a word to the user on why.

    Args:
        bundle: Opened, its files' digests compared.
        deployment: What it was made from.
        weights: What steps bind.
        longest: Packed tokens of a call at most.
        returning: Calls of at most so many tokens may be recorded.
        runtime_for: Gives what executes engines.

    Raises:
        CorruptInputError: the engines are not of the bundle's program.
    """
    made = deployment.programs
    try:
        runtime = runtime_for(bundle.manifest, weights.device)
        engines = _loaded(bundle, deployment, longest, runtime)
        segments = EngineSegments.of(engines, weights, returning)
        segments.check_recordable()
    except UnsupportedError as error:
        if not Placement.here().rank:
            console.say(f"torch runs the segments: {error.message}{f'. {error.hint}' if error.hint else ''}")
        return TorchSegments(made.segments, weights, weights.words)
    weakref.finalize(segments, _keep, runtime)
    return segments


def _loaded(
    bundle: Bundle, deployment: Deployment, longest: int, runtime: EngineRuntime
) -> dict[str, LoadedEngine]:
    program, made = bundle.program, deployment.programs
    assert isinstance(program, SteppedProgram)
    if bundle.manifest.unfinished:
        raise UnsupportedError("the engines are still to be compiled")
    most = max(size.most for size in deployment.ranges)
    if most < longest:
        raise UnsupportedError(f"engines take calls of {most} tokens at most, and {longest} may come")
    engines = {key: runtime.load(bundle.directory / file) for key, file in program.segments.items()}
    check_engines(engines, made.programs, made.forms, deployment.ranges)
    return engines


def _keep(runtime: EngineRuntime) -> None:
    try:
        runtime.keep()
    except Step35Error as error:
        console.say(f"what was compiled here is not kept: {error.message}")
