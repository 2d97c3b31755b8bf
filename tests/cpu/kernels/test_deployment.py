"""Kernels of every kind compile for Hopper, the tightest for others, and pass their static checks."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

import pytest

from step35_trt.config import Step35Config
from step35_trt.kernels import plugin
from step35_trt.kernels.catalogue import PLUGINS, dense, deployment, every, recipes
from step35_trt.kernels.compile import compile_kernels
from step35_trt.kernels.report import report
from step35_trt.kernels.targets import TARGETS
from step35_trt.resources import PUBLISHED
from tests.cpu.test_config import published

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.early


def test_every_kind_compiles_and_passes(cached: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each function in each coding, in its largest tiling; `step35-trt kernels` does the same for all."""
    target = TARGETS["sm_90"]
    every = deployment(Step35Config.load(PUBLISHED), target)
    assert {variant.plugin for variant in every} == set(PLUGINS)
    assert len({(variant.plugin, variant.name) for variant in every}) == len(every)
    # Names end in the tokens that a tiling is for; what comes last is for the most.
    variants = [*{re.sub(r"\.(by)?[\d-]+$", "", variant.name): variant for variant in every}.values()]
    assert len(variants) > 30
    started = time.monotonic()
    compiled = compile_kernels(variants, target)
    with capsys.disabled():
        print(f"\n{len(compiled)} kernels for {target.name}, cold: {time.monotonic() - started:.0f} s")
    reports = [report(kernel) for kernel in compiled]
    assert [(item.kernel, item.failures) for item in reports if item.failures] == []
    for kernel in ("decode", "prefill", "grouped_gate_up"):
        used = [item.instructions for item in reports if item.kernel.split("/")[1].startswith(kernel)]
        assert used
        assert all("wgmma" in kinds for kinds in used)
    assert not any("atomic" in item.instructions for item in reports)
    assert all(kernel.facts.launch.scratch_bytes == 0 for kernel in compiled)


# Of dense algebra one shape in each coding, whose rows and columns fill no last tile; the model's own, which
# fill theirs, are more of the same.
ODD, WIDTH = (300, 640), 1280


@pytest.mark.usefixtures("cached")
def test_dense_algebra_compiles_and_passes() -> None:
    products = [(*ODD, kind) for kind in ("int4", "fp8_channel", "fp8_block")]
    made = plugin.load("dense", "variants").variants(products, [(WIDTH, 1e-5)], [WIDTH])
    variants = [v for v in made if v.constants.get("TOKENS") not in (4, 8)]  # between two that are compiled
    for item in map(report, compile_kernels(variants, TARGETS["sm_90"])):
        assert not item.failures, item.kernel
        kind = "wgmma" if "by128" in item.kernel else "mma"
        assert (kind in item.instructions) == ("linear" in item.kernel), item.kernel


def test_dense_algebra_is_what_segments_say() -> None:
    config = Step35Config.load(PUBLISHED)
    variants = dense(recipes(config))
    assert len({variant.name for variant in variants}) == len(variants)
    shapes = {
        (v.constants["N"], v.constants["K"], v.constants["FORMAT"]) for v in variants if "N" in v.constants
    }
    d, head = config.hidden_size, config.vocab_size
    assert {(head, d, "fp8_channel"), (head, d, "int4"), (d, 2 * d, "fp8_channel")} <= shapes
    assert {v.constants["WIDTH"] for v in variants if v.function == "swiglu"} == {
        config.intermediate_size,
        config.share_expert_dim,
    }
    assert {v.constants["D"] for v in variants if v.function == "rms_norm"} == {d}
    both = every(config, TARGETS["sm_90"])
    assert both == deployment(config, TARGETS["sm_90"]) + variants


# What is tightest on GPUs with little shared memory, and its tactics.
TIGHTEST = (
    "decode-window512-96x8x128-bf16",
    "prefill-full-64x8x128-bf16",
    "grouped_gate_up.int4.257-1048576",
    "grouped_gate_up.bf16.257-",
)


@pytest.mark.usefixtures("cached")
def test_the_tightest_compile_for_spark() -> None:
    target = TARGETS["sm_121"]
    variants = [
        variant
        for variant in deployment(Step35Config.load(PUBLISHED), target)
        if variant.name.startswith(TIGHTEST)
    ]
    assert len(variants) == len(TIGHTEST)
    for item in map(report, compile_kernels(variants, target)):
        assert not item.failures, item.kernel
        assert "mma" in item.instructions


def test_the_published_geometry_is_the_specification() -> None:
    assert Step35Config.load(PUBLISHED) == Step35Config.parse(published())
