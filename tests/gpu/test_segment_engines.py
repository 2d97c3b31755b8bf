"""On a GPU: a bundle's engines against torch on the same weights, segment by segment and as a session."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a CUDA device and compiled kernels", allow_module_level=True)

from step35_trt.build import build_quantized  # noqa: E402 - after the skip
from step35_trt.bundle import Bundle  # noqa: E402
from step35_trt.engine import EngineSpec  # noqa: E402
from step35_trt.errors import UnsupportedError  # noqa: E402
from step35_trt.evaluate import evaluate  # noqa: E402
from step35_trt.finish import finish  # noqa: E402
from step35_trt.quantize.recipe import Recipe  # noqa: E402
from step35_trt.quantize.run import CalibrationOptions, Job  # noqa: E402
from step35_trt.runtime.device.segment_choice import installed_runtime  # noqa: E402
from step35_trt.runtime.device.segment_engines import EngineSegments  # noqa: E402
from step35_trt.runtime.gpu import capabilities  # noqa: E402
from step35_trt.runtime.programs.program_torch import BUFFERS  # noqa: E402
from step35_trt.runtime.programs.torch_segments import TorchSegments  # noqa: E402
from step35_trt.runtime.session_cuda import open_cuda  # noqa: E402
from tests.synthetic import raw_config, write_checkpoint  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

    from step35_trt.runtime.session_program import ProgramSession
    from step35_trt.steps import SegmentStep, StepProgram

DEVICE = torch.device("cuda", 0)
ENGINES = {"12.1": ("dgx-spark-int4", "tensorrt_rtx"), "9.0": ("h200-int4", "tensorrt")}
VOCABULARY = 96
COUNTS = (1, 4, 5, 8, 19, 32)  # by both profiles; sizes that return, and one that does not


@pytest.fixture(scope="module", params=["int4-awq", "int4-experts-fp8", "bf16"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """For the card that is here, its engines compiled."""
    name, module = ENGINES.get(capabilities()[0], ("", ""))
    if not name:
        pytest.skip("no shipped engine is for this GPU")
    pytest.importorskip(module)
    root = tmp_path_factory.mktemp("engines")
    widths = {"hidden_size": 128, "moe_intermediate_size": 128, "moe_num_experts": 4, "moe_top_k": 2}
    raw = raw_config(layers=3, modules=1, moe_layers_enum="1,2", vocab_size=VOCABULARY, **widths)
    source = write_checkpoint(root / "checkpoint", raw)
    recipe = Recipe.load(request.param).model_copy(update={"calibration": None})
    sizes = {"max_tokens": 256, "prefill_chunk": 32, "max_sequences": 2, "draft_tokens": 1}
    spec = EngineSpec.load(name).model_copy(update={"recipe": request.param, **sizes})
    build_quantized(Job.of(source, recipe, CalibrationOptions()), root / "bundle", spec)
    finish(root / "bundle")
    return Bundle.open(root / "bundle")


@pytest.fixture(scope="module")
def by_engines(bundle: Bundle) -> ProgramSession:
    session = open_cuda(bundle, DEVICE)
    assert isinstance(session.runner.executor.segments, EngineSegments)
    return session


@pytest.fixture(scope="module")
def by_torch(bundle: Bundle) -> ProgramSession:
    def none(*_: object) -> Any:
        raise UnsupportedError("torch is asked for")

    session = open_cuda(bundle, DEVICE, none)
    assert isinstance(session.runner.executor.segments, TorchSegments)
    return session


def outputs(session: ProgramSession, program: StepProgram, step: SegmentStep, count: int) -> list[Tensor]:
    """What a segment makes of random numbers."""
    generator = torch.Generator(DEVICE).manual_seed(count)
    described, buffers = {b.name: b for b in program.buffers}, {}
    for name in (*step.inputs.values(), *step.outputs.values()):
        buffer = described[name]
        shape = (count, buffer.width) if buffer.width else (count,)
        values = torch.randn(shape, generator=generator, device=DEVICE)
        if buffer.dtype == "int64":
            values = values.abs() * 30 % VOCABULARY
        buffers[name] = values.to(BUFFERS[buffer.dtype])
    with torch.inference_mode():
        run = session.runner.executor.segments.bind(step, buffers)
        run()
    torch.cuda.synchronize()
    return [buffers[name] for name in step.outputs.values()]


@pytest.mark.parametrize("count", COUNTS)
def test_each_engine_computes_what_torch_does(
    by_engines: ProgramSession, by_torch: ProgramSession, count: int
) -> None:
    """As near as two orders of rounding to bf16 are."""
    for program in by_engines.runner.programs:
        for step in program.steps:
            if step.kind != "segment":
                continue
            pairs = (outputs(session, program, step, count) for session in (by_engines, by_torch))
            for got, want in zip(*pairs, strict=True):
                error = (got.float() - want.float()).abs().max() / want.float().abs().max()
                assert error < 0.03, (step.name, step.engine, error)


def test_sessions_agree(by_engines: ProgramSession, by_torch: ProgramSession) -> None:
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 50)
    got, want = evaluate(by_engines, ids), evaluate(by_torch, ids)
    known = ~np.isnan(want.mtp_logits)
    for one, other in ((got.logits, want.logits), (got.mtp_logits[known], want.mtp_logits[known])):
        assert np.median(np.abs(one - other) / np.abs(other).max()) < 0.01


def test_recordings_are_the_steps_they_recorded(bundle: Bundle, by_engines: ProgramSession) -> None:
    """Bit for bit: replays, after other sizes were recorded from the same engines, against eager steps."""
    eager, found = open_cuda(bundle, DEVICE), []
    eager.runner = replace(eager.runner, record=None)
    for session in (by_engines, eager):
        rng, steps = np.random.default_rng(1), []
        sequence = session.open()
        steps.append(sequence.decode(rng.integers(0, VOCABULARY, 40 - 8), np.array([0])))
        for turn in range(9):
            count = 1 + turn % 3
            steps.append(sequence.decode(rng.integers(0, VOCABULARY, count), np.arange(count)))
        sequence.close()
        found.append(steps)
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one.logits, other.logits)
        np.testing.assert_array_equal(one.hidden, other.hidden)


def test_the_next_start_compiles_nothing(bundle: Bundle, tmp_path: Any, monkeypatch: Any) -> None:
    """What TensorRT-RTX compiled is taken from its file, and nothing is added by the same steps."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runtime = installed_runtime(bundle.manifest, DEVICE)
    if runtime.compiled is None:
        pytest.skip("TensorRT compiles nothing when it runs")

    def steps(used: Any) -> int:
        session = open_cuda(bundle, DEVICE, lambda *_: used)
        for _ in range(3):
            session.open().decode(np.array([1]), np.array([0]))
        used.keep()
        return int(used.compiled.path.stat().st_size)

    first = steps(runtime)
    assert first > 0
    again = installed_runtime(bundle.manifest, DEVICE)
    assert steps(again) == first
