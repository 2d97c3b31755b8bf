"""The session of a bundle for a GPU, on the GPU that it is for.

Segments are run by the bundle's engines, or by torch on the codes that it stores (`segment_choice`); plugins,
and torch's products, by the bundle's compiled kernels, so that nothing is compiled here. A decoding step is
one CUDA graph.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from step35_trt.deployment import Deployment
from step35_trt.dialects.slot_kernels import PlainLaunches, SlotKernels, TritonLaunches
from step35_trt.dialects.torch_kernels import QUERIES, TritonKernels, present_target
from step35_trt.errors import DoesNotFitError
from step35_trt.gpu_weights import StoredWeights
from step35_trt.kernels.jit import JIT
from step35_trt.program import SteppedProgram
from step35_trt.runtime.cache.cache_extent import Extent
from step35_trt.runtime.device.bundle_kernels import bundle_launcher
from step35_trt.runtime.device.device_pages import DevicePages
from step35_trt.runtime.device.device_runner import DeviceRunner
from step35_trt.runtime.device.device_weights import DeviceWeights
from step35_trt.runtime.device.recording import GraphRecorder
from step35_trt.runtime.device.segment_choice import bundle_segments, installed_runtime
from step35_trt.runtime.device.upload import BundleSource, Uploader
from step35_trt.runtime.placement import Placement, said_once
from step35_trt.runtime.programs.leading import follow
from step35_trt.runtime.programs.program_torch import TorchExecutor, refuse
from step35_trt.runtime.programs.ranks import Ranks
from step35_trt.runtime.programs.torch_segments import TorchSegments
from step35_trt.runtime.session_program import ProgramSession

if TYPE_CHECKING:
    from step35_trt.bundle import Bundle
    from step35_trt.config import Step35Config
    from step35_trt.dialects.slot_kernels import Launches
    from step35_trt.kernels.launching import Launcher
    from step35_trt.lower import ModelPrograms
    from step35_trt.runtime.device.device_weights import WeightSource
    from step35_trt.runtime.device.recording import Recorder
    from step35_trt.runtime.device.segment_choice import RuntimeFor
    from step35_trt.runtime.programs.program_torch import SegmentRunner

PAGES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def open_cuda(
    bundle: Bundle, device: torch.device | None = None, runtime_for: RuntimeFor = installed_runtime
) -> ProgramSession:
    """The session of a bundle on a GPU, all weights loaded; on the CPU in plain torch, for small models.

    Where several processes share the model the first has the session, and the others follow it to its end.

    Args:
        bundle: Opened.
        device: Where it runs; absent, on the GPU whose number is this process's on the machine.
        runtime_for: Gives what executes the bundle's engines.

    Raises:
        CorruptInputError: the program is not what this version makes of the model and recipe.
        DoesNotFitError: the GPU's free memory does not hold weights and caches.
        RankLostError: not all processes came; in the others also, that one ended.
        UnsupportedError: a kernel is missing.
        SystemExit: in the others, when the work is done.
    """
    program, manifest, here = bundle.program, bundle.manifest, Placement.here()
    assert isinstance(program, SteppedProgram)
    device = device or torch.device("cuda", here.local)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with said_once():
        made = Deployment.of_bundle(bundle)
    ranks = Ranks.join(device) if program.ranks > 1 else None
    with ranks.working() if ranks else nullcontext():
        runner = _loaded(bundle, made, device, runtime_for, ranks)
    if ranks and here.rank:
        follow(ranks, runner.obey)
    chunk = min(manifest.engine.prefill_chunk, manifest.max_tokens)
    return ProgramSession(bundle.config, runner, manifest.max_tokens, chunk, manifest.engine.max_sequences)


def _loaded(
    bundle: Bundle,
    made: Deployment,
    device: torch.device,
    runtime_for: RuntimeFor,
    ranks: Ranks | None,
) -> DeviceRunner:
    program, manifest, rank = bundle.program, bundle.manifest, ranks.rank if ranks else 0
    assert isinstance(program, SteppedProgram)
    stored = StoredWeights(bundle.directory, program.places(rank), program.experts, program.sharing, rank)
    chunk = min(manifest.engine.prefill_chunk, manifest.max_tokens)
    engine = manifest.engine
    extent = Extent(engine.max_sequences, manifest.max_tokens, chunk, engine.cache_tokens)
    try:
        launcher = bundle_launcher(bundle, made, device)
        weights = device_weights(made.programs, BundleSource(stored, Uploader(device)), device, launcher)
        decoded = extent.slots * QUERIES
        runner = device_runner(
            made.sharing.config(bundle.config),
            made.programs,
            weights,
            extent,
            PAGES[made.recipe.kv_cache],
            segments=bundle_segments(bundle, made, weights, max(chunk, decoded), decoded, runtime_for),
            ranks=ranks,
        )
        load(runner)
    except torch.cuda.OutOfMemoryError:
        free, total = torch.cuda.mem_get_info(device)
        raise DoesNotFitError(
            f"{bundle.directory} does not fit into the {total / 1e9:.0f} GB of this GPU, of which "
            f"{free / 1e9:.0f} were free in the end",
            "End what else runs on it, or build the bundle with less cache_tokens or max_sequences.",
        ) from None
    return runner


def device_weights(
    made: ModelPrograms, source: WeightSource, device: torch.device, launcher: Launcher = JIT
) -> DeviceWeights:
    """A model's weights, none of them loaded: for kernels on a CUDA device, for plain torch on others."""
    return DeviceWeights(source, made.forms, device, device.type == "cuda", launcher)


def device_runner(
    config: Step35Config,
    made: ModelPrograms,
    weights: DeviceWeights,
    extent: Extent,
    pages: torch.dtype,
    record: Recorder | None = None,
    segments: SegmentRunner | None = None,
    ranks: Ranks | None = None,
) -> DeviceRunner:
    """A model's programs where its weights are, with caches.

    Args:
        config: The model; of a rank, as wide as the rank has it.
        made: Its programs.
        weights: Whose device it is.
        extent: Sequences and rows that there is room for.
        pages: What keys and values are kept in.
        record: For decoding steps; by default CUDA graphs on a CUDA device, nothing on others.
        segments: Runs them; by default torch.
        ranks: The others that share the model.

    Raises:
        UnsupportedError: there are no kernels for the device.
    """
    device = weights.device
    launches: Launches = PlainLaunches(weights)
    if weights.compiled:
        target = present_target(device)
        launches = TritonLaunches(TritonKernels(weights, target, launcher=weights.launcher), target)
        if record is None:
            record = recorder = GraphRecorder(device)
            if ranks is not None:
                ranks.before_parting(recorder.release)
    graphs = [config.layers, *((layer,) for layer in config.mtp_layers[: len(made.programs) - 1])]
    kernels = SlotKernels(DevicePages.of(graphs, extent, pages, device), launches, QUERIES)
    segments = segments or TorchSegments(made.segments, weights, weights.words)
    executor = TorchExecutor(segments, weights, ranks.exchange if ranks else refuse, kernels)
    longest = max(extent.call, extent.slots * QUERIES)
    return DeviceRunner(executor, made.programs, kernels, record, longest, ranks)


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
