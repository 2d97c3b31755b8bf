"""Every kernel of a deployment compiles for each GPU we name, without one, and passes its static checks."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from step35_trt.config import Step35Config
from step35_trt.kernels.catalogue import PLUGINS, deployment
from step35_trt.kernels.compile import compile_kernels
from step35_trt.kernels.report import report
from step35_trt.kernels.targets import TARGETS
from step35_trt.resources import PUBLISHED
from tests.cpu.test_config import published

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("name", ["sm_90", "sm_121"])
def test_everything_compiles_and_passes(name: str, cached: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = TARGETS[name]
    variants = deployment(Step35Config.load(PUBLISHED), target)
    assert {variant.plugin for variant in variants} == set(PLUGINS)
    assert len({(variant.plugin, variant.name) for variant in variants}) == len(variants)
    started = time.monotonic()
    compiled = compile_kernels(variants, target)
    with capsys.disabled():
        print(f"\n{len(compiled)} kernels for {name}, cold: {time.monotonic() - started:.0f} s")
    reports = [report(kernel) for kernel in compiled]
    assert [(item.kernel, item.failures) for item in reports if item.failures] == []
    products = "wgmma" if name == "sm_90" else "mma"
    for kernel in ("decode", "prefill", "grouped_gate_up"):
        used = [item.instructions for item in reports if item.kernel.split("/")[1].startswith(kernel)]
        assert used
        assert all(products in kinds for kinds in used)
    assert not any("atomic" in item.instructions for item in reports)
    assert all(kernel.facts.launch.scratch_bytes == 0 for kernel in compiled)


def test_the_published_geometry_is_the_specification() -> None:
    assert Step35Config.load(PUBLISHED) == Step35Config.parse(published())
