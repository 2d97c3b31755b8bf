"""A bundle's kernels are all there and loaded before anything runs; only the driver is not real."""

from __future__ import annotations

import pytest
import torch

from step35_trt import build_tensorrt, bundle
from step35_trt.build import build_quantized
from step35_trt.bundle import Bundle, check_versions
from step35_trt.deployment import Deployment
from step35_trt.engine import EngineSpec
from step35_trt.errors import UnsupportedError
from step35_trt.kernels.cubins import CubinLauncher, Specialisation
from step35_trt.kernels.jit import JIT
from step35_trt.quantize.recipe import Recipe
from step35_trt.quantize.run import CalibrationOptions, Job
from step35_trt.runtime.device import bundle_kernels
from step35_trt.runtime.device.bundle_kernels import bundle_launcher
from tests.cpu.kernels.launched import WritingDriver
from tests.gpu_kernels import uncompiled
from tests.synthetic import raw_config, write_checkpoint

SECOND = torch.device("cuda", 1)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    root = tmp_path_factory.mktemp("kernels")
    widths = {"hidden_size": 128, "moe_intermediate_size": 128, "moe_num_experts": 4, "moe_top_k": 2}
    raw = raw_config(layers=2, modules=1, moe_layers_enum="1", **widths)
    recipe = Recipe.load("int4-experts-fp8").model_copy(update={"calibration": None})
    job = Job.of(write_checkpoint(root / "checkpoint", raw), recipe, CalibrationOptions())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_tensorrt, "compile_kernels", uncompiled)
        build_quantized(job, root / "bundle", EngineSpec.load("h200-int4"))
    return Bundle.open(root / "bundle")


@pytest.fixture
def drivers(monkeypatch: pytest.MonkeyPatch) -> dict[int, WritingDriver]:
    """By device, those that were asked for."""
    found: dict[int, WritingDriver] = {}
    monkeypatch.setattr(bundle_kernels, "CudaDriver", lambda index: found.setdefault(index, WritingDriver()))
    return found


def test_every_kernel_is_loaded_on_the_device(opened: Bundle, drivers: dict[int, WritingDriver]) -> None:
    made = Deployment.of_bundle(opened)
    launcher = bundle_launcher(opened, made, SECOND)
    assert isinstance(launcher, CubinLauncher)
    assert not launcher.interpreted
    assert [code.decode() for code, _, _ in drivers[1].loaded] == [v.name for v in made.kernels()]
    assert launcher.kernels.keys() == set(map(Specialisation.of, made.kernels()))
    assert len(launcher.kernels) == len(opened.program.kernels)
    plugins = {asked.plugin for asked in launcher.kernels}
    assert plugins == {"gated_attention", "sparse_moe", "dense"}


def test_elsewhere_triton_s_interpreter_runs_them(opened: Bundle, drivers: dict[int, WritingDriver]) -> None:
    assert bundle_launcher(opened, Deployment.of_bundle(opened), torch.device("cpu")) is JIT
    assert not drivers


@pytest.mark.usefixtures("drivers")
def test_a_bundle_that_lacks_one_says_how_to_make_it(opened: Bundle) -> None:
    kept = [kernel for kernel in opened.program.kernels if not kernel.name.startswith("swiglu")]
    program = opened.program.model_copy(update={"kernels": tuple(kept)})
    older = opened.model_copy(update={"program": program})
    with pytest.raises(UnsupportedError, match=r"has no kernel dense/swiglu-\d+, which") as caught:
        bundle_launcher(older, Deployment.of_bundle(opened), SECOND)
    assert "build-engine CHECKPOINT" in caught.value.hint
    assert "--engine h200-int4" in caught.value.hint


def test_triton_s_version_is_its_builder_s_alone(opened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "triton" in opened.manifest.versions
    here = bundle.versions("tensorrt")
    monkeypatch.setattr(bundle, "versions", lambda _: here | {"triton": "none"})
    check_versions(opened.manifest)


def test_names_are_files_of_their_own(opened: Bundle) -> None:
    files = [name for kernel in opened.program.kernels for name in (kernel.code, kernel.launch)]
    assert len(set(files)) == len(files)
