"""The static report: what a kernel takes and uses, and that its checks can fail."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest

from step35_trt import cli
from step35_trt.kernels import catalogue
from step35_trt.kernels import compile as compiler
from step35_trt.kernels.compile import compile_kernels
from step35_trt.kernels.report import report
from step35_trt.kernels.targets import TARGETS
from tests.cpu.kernels import toys

if TYPE_CHECKING:
    from pathlib import Path

    from step35_trt.kernels.report import KernelReport

pytestmark = pytest.mark.usefixtures("cached")


def reported(root: Path, target: str) -> dict[str, KernelReport]:
    variants = [toys.SCALE, toys.PRODUCT, toys.SPILLING, toys.LARGE]
    reports = [report(kernel) for kernel in compile_kernels(variants, TARGETS[target], root=root)]
    return {item.kernel.removeprefix("toy/"): item for item in reports}


def test_hopper(toy_root: Path) -> None:
    found = reported(toy_root, "sm_90")
    assert {"wgmma", "cp.async", "st.128"} <= found["product-64"].instructions.keys()
    assert "mma" not in found["product-64"].instructions
    assert found["scale-1024"].instructions == {
        "ld.128": 1,
        "st.128": 2,
    }
    assert not found["scale-1024"].failures
    assert not found["product-64"].failures
    assert "spills" in found["product-256"].failures[0]
    assert found["product-256"].spill_bytes > 0


def test_spark(toy_root: Path) -> None:
    found = reported(toy_root, "sm_121")
    assert "mma" in found["product-64"].instructions
    assert "wgmma" not in found["product-64"].instructions
    assert any("shared memory of 101376" in failure for failure in found["product-deep"].failures)
    assert found["product-deep"].shared_bytes > 99 * 1024
    # What does not fit here fits a GPU with more.
    hopper = reported(toy_root, "sm_90")["product-deep"]
    assert not any("shared" in failure for failure in hopper.failures)


def test_the_command_fails_with_a_kernel(
    toy_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = [toys.PRODUCT]
    monkeypatch.setattr(catalogue, "every", lambda config, gpu: variants)
    monkeypatch.setattr(
        compiler,
        "compile_kernels",
        lambda some, gpu, progress: compile_kernels(some, gpu, root=toy_root, progress=progress),
    )

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["step35-trt", "kernels", "--target", "sm_90", *arguments])
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    assert run("--json", "-o", str(tmp_path)) == 0
    [line] = json.loads(capsys.readouterr().out)
    assert (line["kernel"], line["failures"]) == ("toy/product-64", [])
    assert {path.name for path in (tmp_path / "toy").iterdir()} == {
        "product-64.ptx",
        "product-64.cubin",
        "product-64.json",
    }
    variants.append(toys.SPILLING)
    assert run() == 5
    output = capsys.readouterr()
    assert "232448 B shared a block" in output.out
    assert "1 of 2 kernels" in output.err
    assert "product-256 spills" in output.err
