"""Steps whose numbers lie on the device, through the very kernels, in Triton's interpreter."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from benchmarks.gpu_sources import RandomSource
from step35_trt.config import Step35Config
from step35_trt.dialects.slot_kernels import Launches, PlainLaunches, SlotKernels, TritonLaunches
from step35_trt.dialects.torch_kernels import TritonKernels
from step35_trt.gpu_forms import deployed_forms
from step35_trt.kernels import plugin
from step35_trt.kernels.targets import TARGETS
from step35_trt.lower import ModelPrograms
from step35_trt.quantize.recipe import Recipe
from step35_trt.runtime.cache.cache_extent import Extent
from step35_trt.runtime.device.device_pages import DeviceBatch, DevicePages
from step35_trt.runtime.device.device_runner import NOBODY, DeviceRunner
from step35_trt.runtime.device.device_weights import DeviceWeights
from step35_trt.runtime.programs.orders import StepOrder
from step35_trt.runtime.programs.program_torch import TorchExecutor
from step35_trt.runtime.programs.torch_segments import TorchSegments
from tests.cpu.plugins.gated_attention.cases import EPS, layer
from tests.synthetic import raw_config

CPU, HOPPER = torch.device("cpu"), TARGETS["sm_90"]


@pytest.fixture(scope="module")
def config() -> Step35Config:
    widths = {"hidden_size": 128, "moe_intermediate_size": 128, "moe_num_experts": 4, "moe_top_k": 2}
    return Step35Config.parse(raw_config(layers=2, modules=1, moe_layers_enum="1", **widths))


def runner_of(config: Step35Config, *, compiled: bool) -> DeviceRunner:
    forms, formats = deployed_forms(Recipe.load("int4-experts-fp8"), config)
    assert set(formats.values()) == {"int4"}
    made = ModelPrograms.of(config, forms)
    weights = DeviceWeights(RandomSource(made.forms, formats, CPU), made.forms, CPU, compiled)
    launches: Launches = PlainLaunches(weights)
    if compiled:
        launches = TritonLaunches(TritonKernels(weights, HOPPER), HOPPER)
    caches = DevicePages.of([config.layers, config.mtp_layers], Extent(3, 200, 24), torch.bfloat16, CPU)
    kernels = SlotKernels(caches, launches, 4)
    segments = TorchSegments(made.segments, weights, weights.words)
    executor = TorchExecutor(segments, weights, kernels=kernels)
    return DeviceRunner(executor, made.programs, kernels, None, 24)


def order(graph: int, slots: tuple[int, ...], pasts: tuple[int, ...], lengths: tuple[int, ...]) -> StepOrder:
    count = sum(lengths)
    ids = np.random.default_rng(count).integers(0, 97, count)
    return StepOrder(graph, slots, pasts, lengths, ids, np.arange(count))


STEPS = [
    (order(0, (1,), (0,), (5,)), None),
    (order(0, (2, 1), (0, 5), (2, 1)), None),
    (order(1, (2,), (0,), (1,)), np.ones((1, 128), np.float32)),
]


def test_kernels_compute_what_plain_torch_does(config: Step35Config) -> None:
    compiled, plain = (runner_of(config, compiled=kind) for kind in (True, False))
    for step, hidden in STEPS:
        for got, want in zip(compiled.run(step, hidden), plain.run(step, hidden), strict=True):
            error = (got.float() - want.float()).abs().max() / want.float().abs().max()
            assert 0 < error < 0.05  # all is rounded to bf16, and not at the same places


@pytest.mark.parametrize("window", [0, 20])
def test_bounds_of_launches_change_no_bit(window: int) -> None:
    """A recorded step knows only how long sequences may be; as it comes it knows how long they are."""
    spec, generator = layer(8, 1, 16, window, 8), torch.Generator().manual_seed(0)
    lengths, pasts, slots = (2, 1, 4), (150, 0, 260), torch.tensor([2, 0, 1], dtype=torch.int32)
    found = []
    for known in (True, False):
        generator.manual_seed(0)
        caches = DevicePages.of([[spec]], Extent(3, 400, 8), torch.float32, CPU)
        for kept in (caches.keys, caches.values):
            kept[spec.index].normal_(generator=generator)
        pages = torch.randperm(caches.layout.tables[0].pages, generator=generator)
        caches.entries.copy_(pages[: len(caches.entries)])
        launches = TritonLaunches(TritonKernels(None, HOPPER), HOPPER)
        kernels = SlotKernels(caches, launches, 4)
        batch = plugin.load("gated_attention", "batch").Batch.of(lengths, pasts)
        if not known:
            batch = DeviceBatch(7, 3, 4, 400, batch.starts, batch.offsets, batch.token_sequence)
        kernels.place(batch, slots)
        q, k, v, gate = (torch.randn(7, width, generator=generator) for width in (128, 16, 16, 8))
        gammas = torch.ones(2, 16)
        found.append(kernels.gated_attention(NOBODY, q, k, v, gate, gammas[0], gammas[1], EPS, spec))
        kernels.launches = PlainLaunches(None)
        plain = kernels.gated_attention(NOBODY, q, k, v, gate, gammas[0], gammas[1], EPS, spec)
        torch.testing.assert_close(found[-1], plain, atol=2e-5, rtol=1e-4)
    assert torch.equal(*found)


def test_a_table_that_is_too_short_is_refused() -> None:
    spec = layer(8, 1, 16, 0, 8)
    cache = DevicePages.of([[spec]], Extent(1, 128, 8), torch.float32, CPU)
    geometry = plugin.load("gated_attention", "geometry").Geometry.of(spec, EPS, 4)
    numbers = torch.zeros(2, dtype=torch.int32)
    line = cache.lines(cache.layout.tables[0], torch.zeros(1, dtype=torch.int32))
    for longest in (128, 129):
        batch = DeviceBatch(1, 1, 1, longest, numbers, numbers[:1], numbers[:1])
        refused = pytest.raises(ValueError, match="the table spans 128") if longest > 128 else nullcontext()
        with refused:
            batch.check(cache.cache(spec.index, line), geometry)
