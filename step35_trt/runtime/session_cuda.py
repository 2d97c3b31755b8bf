"""The session of a bundle for a GPU, on the GPU that it is for.

Segments are run by torch on the codes that the bundle stores, plugins and products by kernels that Triton
compiles when they are first used; decoding steps are CUDA graphs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from step35_trt.deployment import Deployment
from step35_trt.dialects.slot_kernels import PlainLaunches, SlotKernels, TritonLaunches
from step35_trt.dialects.torch_kernels import QUERIES, TritonKernels, present_target
from step35_trt.errors import DoesNotFitError, UnsupportedError
from step35_trt.gpu_weights import StoredWeights
from step35_trt.program import SteppedProgram
from step35_trt.runtime.device_runner import DeviceRunner
from step35_trt.runtime.device_weights import DeviceWeights
from step35_trt.runtime.program_torch import TorchExecutor
from step35_trt.runtime.recording import GraphRecorder
from step35_trt.runtime.session_program import ProgramSession
from step35_trt.runtime.slot_caches import Extent, SlotCaches
from step35_trt.runtime.upload import BundleSource, Uploader

if TYPE_CHECKING:
    from step35_trt.bundle import Bundle
    from step35_trt.config import Step35Config
    from step35_trt.dialects.slot_kernels import Launches
    from step35_trt.lower import ModelPrograms
    from step35_trt.runtime.device_weights import WeightSource
    from step35_trt.runtime.recording import Recorder

PAGES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


FIRST = torch.device("cuda", 0)


def open_cuda(bundle: Bundle, device: torch.device = FIRST) -> ProgramSession:
    """The session of a bundle on a GPU, all weights loaded; on the CPU in plain torch, for small models.

    Raises:
        CorruptInputError: the program is not what this version makes of the model and recipe.
        DoesNotFitError: the GPU's free memory does not hold weights and caches.
        UnsupportedError: the engine is for several GPUs.
    """
    program, manifest = bundle.program, bundle.manifest
    assert isinstance(program, SteppedProgram)
    if program.ranks > 1:
        raise UnsupportedError(
            f"{bundle.directory} is shared by {program.ranks} GPUs, and this version runs engines on one",
            "Build it with an engine for one GPU, such as h200-int4.",
        )
    made = Deployment.of_bundle(bundle)
    stored = StoredWeights(bundle.directory, program.places(), program.experts)
    chunk = min(manifest.engine.prefill_chunk, manifest.max_tokens)
    extent = Extent(manifest.engine.max_sequences, manifest.max_tokens, chunk)
    try:
        runner = device_runner(
            bundle.config,
            made.programs,
            device_weights(made.programs, BundleSource(stored, Uploader(device)), device),
            extent,
            PAGES[made.recipe.kv_cache],
        )
        load(runner)
    except torch.cuda.OutOfMemoryError:
        free, total = torch.cuda.mem_get_info(device)
        raise DoesNotFitError(
            f"{bundle.directory} does not fit into the {total / 1e9:.0f} GB of this GPU, of which "
            f"{free / 1e9:.0f} were free in the end",
            "End what else runs on it, or build the bundle with less max_tokens or max_sequences.",
        ) from None
    return ProgramSession(bundle.config, runner, manifest.max_tokens, chunk, manifest.engine.max_sequences)


def device_weights(made: ModelPrograms, source: WeightSource, device: torch.device) -> DeviceWeights:
    """A model's weights, none of them loaded: for kernels on a CUDA device, for plain torch on others."""
    return DeviceWeights(source, made.forms, device, compiled=device.type == "cuda")


def device_runner(
    config: Step35Config,
    made: ModelPrograms,
    weights: DeviceWeights,
    extent: Extent,
    pages: torch.dtype,
    record: Recorder | None = None,
) -> DeviceRunner:
    """A model's programs where its weights are, with caches.

    Args:
        config: The model.
        made: Its programs.
        weights: Whose device it is.
        extent: Sequences and rows that there is room for.
        pages: What keys and values are kept in.
        record: For decoding steps; by default CUDA graphs on a CUDA device, nothing on others.

    Raises:
        UnsupportedError: there are no kernels for the device.
    """
    device = weights.device
    launches: Launches = PlainLaunches(weights)
    if weights.compiled:
        target = present_target(device)
        launches = TritonLaunches(TritonKernels(weights, target), target)
        record = record or GraphRecorder(device)
    layers = (*config.layers, *config.mtp_layers[: len(made.programs) - 1])
    kernels = SlotKernels(SlotCaches.of(layers, extent, pages, device), launches, QUERIES)
    executor = TorchExecutor(made.segments, weights, kernels=kernels, words=weights.words)
    return DeviceRunner(executor, made.programs, kernels, record, max(extent.call, extent.slots * QUERIES))


def load(runner: DeviceRunner) -> None:
    """Bring every weight that the programs name to the device, in the order of their steps."""
    weights = runner.executor.weights
    assert isinstance(weights, DeviceWeights)
    names: dict[str, None] = {}
    prefixes: dict[str, None] = {}
    for program in runner.programs:
        for step in program.steps:
            if step.kind == "segment":
                names |= dict.fromkeys(binding.weight for binding in step.weights.values())
            elif step.kind == "kernel" and step.call.plugin == "sparse_moe":
                prefixes[step.call.experts] = None
    with torch.inference_mode():
        weights.load(list(names), list(prefixes))
    if runner.device.type == "cuda":
        torch.cuda.synchronize(runner.device)
