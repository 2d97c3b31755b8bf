"""On a GPU: nano's greedy tokens, recorded steps against steps as they come, and drafting."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a CUDA device and compiled kernels", allow_module_level=True)

from benchmarks import gpu_model  # noqa: E402 - after the skip
from benchmarks.gpu_model import Model  # noqa: E402
from benchmarks.gpu_sources import CheckpointSource  # noqa: E402
from step35_trt.build import build_quantized  # noqa: E402
from step35_trt.checkpoint import Checkpoint, expected_tensors  # noqa: E402
from step35_trt.engine import EngineSpec  # noqa: E402
from step35_trt.finish import finish  # noqa: E402
from step35_trt.lower import ModelPrograms  # noqa: E402
from step35_trt.quantize.recipe import Recipe  # noqa: E402
from step35_trt.quantize.run import CalibrationOptions, Job  # noqa: E402
from step35_trt.resources import NANO  # noqa: E402
from step35_trt.runtime.cache.cache_extent import Extent  # noqa: E402
from step35_trt.runtime.decoding.generate import generate  # noqa: E402
from step35_trt.runtime.decoding.sampling import SamplingParams  # noqa: E402
from step35_trt.runtime.gpu import capabilities  # noqa: E402
from step35_trt.runtime.load import open_bundle  # noqa: E402
from step35_trt.runtime.session import Call  # noqa: E402
from step35_trt.runtime.session_cuda import device_runner, device_weights  # noqa: E402
from step35_trt.runtime.session_program import ProgramSession  # noqa: E402
from step35_trt.weight_forms import Forms  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path

DEVICE = torch.device("cuda", 0)


def session_of(model: Model, *, recorded: bool) -> ProgramSession:
    runner = device_runner(model.config, model.made, model.weights, Extent(3, 512, 64), torch.bfloat16)
    runner = runner if recorded else replace(runner, record=None)
    return ProgramSession(model.config, runner, 512, 64, 3)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.of(gpu_model.dry().config, DEVICE)


def answer(session: ProgramSession, drafts: int) -> list[int]:
    chunks = generate(session, list(range(100, 180)), SamplingParams(), max_tokens=60, draft_tokens=drafts)
    return [token for chunk in chunks for token in chunk]


def test_nano_gives_the_cpu_s_tokens() -> None:
    [line] = gpu_model.check(gpu_model.whole(), DEVICE, gpu_model.Budget(5))
    assert line["equal_to_cpu"], line
    assert line["graphs_equal_eager"]


def test_kernels_are_as_near_to_fp32_as_plain_bf16() -> None:
    [line] = gpu_model.slice_stage(replace(gpu_model.dry(), compared=200), DEVICE, gpu_model.Budget(5))
    assert line["within_bf16"], line


def test_graphs_are_the_steps_they_recorded(model: Model) -> None:
    """Bit for bit, with several sequences in changing slots."""
    found = []
    for recorded in (True, False):
        session, rng, steps = session_of(model, recorded=recorded), np.random.default_rng(0), []
        first, second = session.open(), session.open()
        for sequence, length in ((first, 60), (second, 30)):
            steps.append(sequence.decode(rng.integers(0, 1024, length), np.array([length - 1])))

        for turn in range(12):
            pair = (first, second) if turn % 2 else (second, first)
            calls = [Call(s, rng.integers(0, 1024, 1 + turn % 3), np.array([0])) for s in pair]
            steps += session.decode(calls)
        found.append(steps)
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one.logits, other.logits)
        np.testing.assert_array_equal(one.hidden, other.hidden)


def test_a_prefix_is_found_again(model: Model) -> None:
    """From pages that others may hold too; the steps that are left are the same, and not a bit differs."""
    session, ids = session_of(model, recorded=True), np.random.default_rng(1).integers(0, 1024, 310)
    steps = []
    for _ in range(2):
        sequence = session.open(ids, 0)
        for start in (*range(sequence.length, 300, 64), *range(300, 310)):
            part = ids[start : min(start + 64, 300) if start < 300 else start + 1]
            last = sequence.decode(part, np.array([len(part) - 1]))
            if start >= 256:
                steps.append(last)
        session.open().decode(ids[:50], np.array([0]))  # takes pages in between
        sequence.close()
        assert session.open(ids, 0).length == 256
    for one, other in zip(steps[:11], steps[11:], strict=True):
        np.testing.assert_array_equal(one.logits, other.logits)


def test_drafts_change_no_token() -> None:
    """In fp32, where best tokens lie further apart than orders of additions."""
    checkpoint = Checkpoint.open(NANO)
    forms = Forms.of(Recipe.load("fp32"), expected_tensors(checkpoint.config))
    made = ModelPrograms.of(checkpoint.config, forms)
    weights = device_weights(made, CheckpointSource(checkpoint, forms, DEVICE), DEVICE)
    runner = device_runner(checkpoint.config, made, weights, Extent(1, 512, 64), torch.float32)
    session = ProgramSession(checkpoint.config, runner, 512, 64, 1)
    assert answer(session, 3) == answer(session, 0)


def test_a_bundle_is_opened(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt")
    if capabilities()[:1] != ["9.0"]:
        pytest.skip("this is for Hopper")
    spec = EngineSpec.load("h200-int4").model_copy(update={"recipe": "bf16", "max_tokens": 512})
    rounded = Recipe.load("bf16").model_copy(update={"calibration": None})
    build_quantized(Job.of(NANO, rounded, CalibrationOptions()), tmp_path / "bundle", spec)
    assert finish(tmp_path / "bundle")
    assert len(answer(open_bundle(tmp_path / "bundle"), 3)) == 60
