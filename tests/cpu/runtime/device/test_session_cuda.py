"""A GPU bundle's way from its files to a session; of the device alone nothing is here but its name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.gpu_sources import DecodedWeights
from step35_trt import build_tensorrt
from step35_trt.build import build_quantized
from step35_trt.bundle import Bundle, Manifest
from step35_trt.engine import EngineSpec
from step35_trt.errors import CorruptInputError, UnsupportedError
from step35_trt.evaluate import evaluate
from step35_trt.gpu_forms import deployed_forms
from step35_trt.quantize.recipe import Recipe
from step35_trt.quantize.run import CalibrationOptions, Job
from step35_trt.runtime import gpu, load, session_cuda
from step35_trt.runtime.session_cuda import open_cuda
from step35_trt.runtime.session_torch import TorchSession
from tests.gpu_kernels import uncompiled
from tests.synthetic import raw_config, write_checkpoint

CPU = torch.device("cpu")
RECIPES = ("int4-experts-fp8", "int4-awq")


@pytest.fixture(scope="module", params=RECIPES)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Sealed, for Hopper, its kernels a byte each: nothing here runs them."""
    root = tmp_path_factory.mktemp("cuda")
    widths = {"hidden_size": 128, "moe_intermediate_size": 128, "moe_num_experts": 4, "moe_top_k": 2}
    raw = raw_config(layers=3, modules=1, moe_layers_enum="1,2", vocab_size=96, **widths)
    source = write_checkpoint(root / "checkpoint", raw)
    recipe = Recipe.load(request.param).model_copy(update={"calibration": None})
    spec = EngineSpec.load("h200-int4").model_copy(
        update={"recipe": request.param, "max_tokens": 256, "prefill_chunk": 32, "max_sequences": 2}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_tensorrt, "compile_kernels", uncompiled)
        build_quantized(Job.of(source, recipe, CalibrationOptions()), root / "bundle", spec)
    return Bundle.open(root / "bundle")


def test_a_bundle_s_own_weights_are_run(bundle: Bundle) -> None:
    """Against fp32 arithmetic on the same codes, as near as bf16 comes to it."""
    session = open_cuda(bundle, CPU)
    assert (session.max_tokens, session.prefill_chunk, session.capacity.sequences) == (256, 32, 2)
    weights = session.runner.executor.weights
    forms, formats = deployed_forms(bundle.manifest.recipe, bundle.config)
    assert {weights.experts(prefix).format for prefix in formats} == {"int4"}
    ids = np.random.default_rng(0).integers(0, 96, 40)
    exact = TorchSession(bundle.config, DecodedWeights(weights.source, forms, torch.float32), 32)
    got, want = evaluate(session, ids), evaluate(exact, ids)
    known = ~np.isnan(want.mtp_logits)  # rows that a module has no token for
    assert np.array_equal(known, ~np.isnan(got.mtp_logits))
    for one, other in ((got.logits, want.logits), (got.mtp_logits[known], want.mtp_logits[known])):
        error = np.abs(one - other) / np.abs(other).max()
        assert 0 < np.median(error) < 0.01


def test_all_weights_are_loaded_when_it_opens(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_cuda(bundle, CPU)

    def late(self: object, name: str) -> None:
        raise AssertionError(f"{name} is read by the first step")

    monkeypatch.setattr(session_cuda.BundleSource, "_pair", late)
    session.open().decode(np.arange(5), np.array([4]))


def manifest_of(bundle: Bundle, **changes: object) -> Bundle:
    manifest: Manifest = bundle.manifest.model_copy(update=changes)
    return bundle.model_copy(update={"manifest": manifest})


def test_a_machine_that_fits_opens_it(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Bundle] = []
    monkeypatch.setattr(gpu, "capabilities", lambda: ["9.0"])
    monkeypatch.setattr(gpu, "check_versions", lambda _: None)
    monkeypatch.setattr(session_cuda, "open_cuda", opened.append)
    with pytest.raises(UnsupportedError, match="still to be compiled"):
        load.open_session(bundle)
    finished = manifest_of(bundle, unfinished=())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match="cannot use its GPU"):
        load.open_session(finished)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    load.open_session(finished)
    assert opened == [finished]


def test_what_it_does_not_run(bundle: Bundle) -> None:
    other = manifest_of(bundle, recipe=Recipe.load("bf16"))
    with pytest.raises(CorruptInputError, match="is not what its model and recipe make"):
        open_cuda(other, CPU)
