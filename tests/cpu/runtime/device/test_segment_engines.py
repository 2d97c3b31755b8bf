"""Segments by engines: a bundle's own, for DGX Spark, executed on the CPU on the memory they are told."""

from __future__ import annotations

import functools
import gc
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step35_trt import build_tensorrt
from step35_trt import bundle as bundles
from step35_trt.build import build_quantized
from step35_trt.bundle import Bundle
from step35_trt.dialects.tensorrt_segment import Builder, Profile, profiles
from step35_trt.engine import EngineSpec
from step35_trt.errors import CorruptInputError, UnsupportedError
from step35_trt.quantize.recipe import Recipe
from step35_trt.quantize.run import CalibrationOptions, Job
from step35_trt.runtime.decoding.generate import generate
from step35_trt.runtime.decoding.sampling import SamplingParams
from step35_trt.runtime.device import segment_choice
from step35_trt.runtime.device.device_weights import DeviceWeights
from step35_trt.runtime.device.segment_engines import EngineSegments, narrowest
from step35_trt.runtime.programs.torch_segments import TorchSegments
from step35_trt.runtime.session import Call
from step35_trt.runtime.session_cuda import open_cuda
from tests.gpu_kernels import uncompiled
from tests.segment_runtime import RememberingBuilder, TorchContext, TorchRuntime
from tests.synthetic import raw_config, write_checkpoint
from tests.tape import TapeRecorder

if TYPE_CHECKING:
    from collections.abc import Callable

    from step35_trt.runtime.session_program import ProgramSession
    from step35_trt.steps import WeightBinding

CPU = torch.device("cpu")
RECIPES = ("int4-awq", "int4-experts-fp8", "bf16")
VOCABULARY = 96


@dataclass(frozen=True)
class Built:
    """A bundle, and what its engines were built from."""

    bundle: Bundle
    builder: RememberingBuilder

    def runtime(self) -> TorchRuntime:
        return TorchRuntime(self.builder.blueprints)


def session_of(built: Built, runtime: TorchRuntime) -> ProgramSession:
    session = open_cuda(built.bundle, CPU, lambda *_: runtime)
    assert isinstance(session.runner.executor.segments, EngineSegments)
    return session


def by_torch(built: Built) -> ProgramSession:
    session = open_cuda(built.bundle, CPU)
    assert isinstance(session.runner.executor.segments, TorchSegments)
    return session


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """Two sequences, a draft of one token each: profiles for 1 to 4 tokens and for 1 to 32."""

    @functools.cache
    def made(name: str) -> Built:
        root, builder = tmp_path_factory.mktemp("engines"), RememberingBuilder.of()
        widths = {"hidden_size": 128, "moe_intermediate_size": 128, "moe_num_experts": 4, "moe_top_k": 2}
        raw = raw_config(layers=3, modules=1, moe_layers_enum="1,2", vocab_size=VOCABULARY, **widths)
        source = write_checkpoint(root / "checkpoint", raw)
        recipe = Recipe.load(name).model_copy(update={"calibration": None})
        sizes = {"max_tokens": 256, "prefill_chunk": 32, "max_sequences": 2, "draft_tokens": 1}
        spec = EngineSpec.load("dgx-spark-int4").model_copy(update={"recipe": name, **sizes})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build_tensorrt, "compile_kernels", uncompiled)
            patch.setattr(Builder, "rtx", lambda: builder)
            build_quantized(Job.of(source, recipe, CalibrationOptions()), root / "bundle", spec)
        return Built(Bundle.open(root / "bundle"), builder)

    return made


@pytest.fixture(params=RECIPES)
def each(build: Callable[[str], Built], request: pytest.FixtureRequest) -> Built:
    """Weights in int4 and int8, in FP8, and as they are."""
    return build(request.param)


@pytest.fixture
def built(build: Callable[[str], Built]) -> Built:
    return build(RECIPES[0])


def story(session: ProgramSession) -> list[np.ndarray]:
    """Prompts in whole and odd chunks, without and with wanted rows; decoding together; an MTP module."""
    rng, found = np.random.default_rng(0), list[np.ndarray]()

    def call(sequence: Any, count: int, rows: int, hidden: np.ndarray | None = None) -> Call:
        return Call(sequence, rng.integers(0, VOCABULARY, count), np.arange(rows), hidden)

    first, second = session.open(), session.open()
    for calls in (
        [call(first, 32, 0)],
        [call(first, 11, 11)],
        [call(second, 20, 1)],
        [call(first, 1, 1), call(second, 1, 1)],
        [call(second, 1, 1), call(first, 1, 1)],
        [call(first, 2, 2), call(second, 3, 3)],
        [call(first, 4, 1), call(second, 4, 4)],
        [call(second, 9, 9)],
    ):
        for step in session.decode(calls):
            found += [step.logits, step.hidden]
    for count in (7, 2):
        [step] = session.draft(0, [call(first, count, 1, np.ones((count, 128), np.float32))])
        found += [step.logits, step.hidden]
    return found


def test_engines_compute_what_torch_does(each: Built) -> None:
    """Not a bit differs: the same arithmetic, on what lies where the engines were told."""
    runtime = each.runtime()
    for one, other in zip(story(session_of(each, runtime)), story(by_torch(each)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(runtime.loaded) == len(each.bundle.program.segments)
    assert all(any(context.runs for context in engine.contexts) for engine in runtime.loaded)


def test_tokens_are_torch_s(built: Built) -> None:
    def answer(session: ProgramSession) -> list[int]:
        chunks = generate(session, list(range(40)), SamplingParams(), max_tokens=12, draft_tokens=1)
        return [token for chunk in chunks for token in chunk]

    assert answer(session_of(built, built.runtime())) == answer(by_torch(built))


def test_engines_are_recorded(each: Built) -> None:
    """The whole step as one recording; a replay asks no engine anything."""
    runtime, recorder = each.runtime(), TapeRecorder()
    session = session_of(each, runtime)
    session.runner = replace(session.runner, record=recorder)
    for one, other in zip(story(session), story(by_torch(each)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert (recorder.recorded, recorder.replayed) == (4, 1)
    sequence = session.open()
    for _ in range(3):
        runs = sum(context.runs for context in runtime.contexts)
        sequence.decode(np.array([5]), np.array([0]))
    assert runs == sum(context.runs for context in runtime.contexts)


def test_a_context_for_each_size_that_returns(built: Built) -> None:
    """What may be recorded keeps its shapes; the ends of prompts share a context."""
    runtime = built.runtime()
    story(session_of(built, runtime))
    largest = max(runtime.loaded, key=lambda engine: len(engine.contexts))
    decode, prefill = profiles(2, 1, 32)
    found = [(c.range, c.returning, c.shapes["x0"][0]) for c in largest.contexts]
    counts = sorted(count for _, returning, count in found if returning)
    assert counts == [1, 2, 5, 8, 32]  # one tried out, decoding, two verifications, and a whole chunk
    assert {size for size, _, count in found if count <= decode.most} == {decode}
    assert {size for size, _, count in found if count > decode.most} == {prefill}
    assert sum(not returning for _, returning, _ in found) == 1
    assert {(c.scratch.address, c.scratch.nbytes) for c in runtime.contexts} == {
        (c.scratch.address, max(e.scratch_bytes for e in runtime.loaded)) for c in runtime.contexts[:1]
    }


def test_weights_are_held_once_as_they_are_stored(each: Built) -> None:
    runtime = each.runtime()
    session = session_of(each, runtime)
    story(session)
    weights, forms = session.runner.executor.weights, session.runner.executor.weights.forms
    assert not weights._coded
    bindings = {
        (binding.weight, binding.part): binding
        for program in session.runner.programs
        for step in program.steps
        if step.kind == "segment"
        for binding in step.weights.values()
    }
    held = [t for pair in weights._dense.values() for t in pair if t is not None]
    held += weights._vectors.values()
    places = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    assert len(places) == len(held)
    gammas = {c.q_gamma for c in attentions(session)} | {c.k_gamma for c in attentions(session)}
    names = {name for name, _ in bindings} | gammas
    assert {t.data_ptr() for t in map(weights.bound, bindings.values())} <= {t.data_ptr() for t in held}
    assert sum(t.nbytes for t in held) == sum(forms(name).nbytes for name in names)


def test_weights_are_what_engines_were_promised(built: Built) -> None:
    """Codes and scales as the file has them; of a norm, 1 + gamma, which the engine does not add."""
    session = session_of(built, built.runtime())
    weights, parts = session.runner.executor.weights, set()
    for step in session.runner.programs[0].steps:
        if step.kind != "segment":
            continue
        for binding in step.weights.values():
            bound, stored = weights.bound(binding), weights.source.dense(binding.weight)
            parts.add((binding.part, binding.plus))
            if binding.part == "vector":
                assert torch.equal(bound, stored[0].float() + binding.plus)
            else:
                assert torch.equal(bound, stored[binding.part == "scales"])
    assert parts == {("values", 0.0), ("scales", 0.0), ("vector", 0.0), ("vector", 1.0)}


def attentions(session: ProgramSession) -> list[Any]:
    steps = (step for program in session.runner.programs for step in program.steps)
    calls = (step.call for step in steps if step.kind == "kernel")
    return [call for call in calls if call.plugin == "gated_attention"]


# What goes wrong is seen.


@pytest.mark.parametrize("part", ["values", "vector"])
def test_another_layer_s_weight(built: Built, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    name = {"values": "self_attn.k_proj.weight", "vector": "input_layernorm.weight"}[part]
    right = DeviceWeights.bound

    def swapped(self: DeviceWeights, binding: WeightBinding) -> torch.Tensor:
        if binding.weight.endswith(f"layers.1.{name}") and binding.part != "scales":
            binding = binding.model_copy(update={"weight": f"model.layers.2.{name}"})
        return right(self, binding)

    monkeypatch.setattr(DeviceWeights, "bound", swapped)
    wrong, want = story(session_of(built, built.runtime())), story(by_torch(built))
    assert any(not np.array_equal(one, other) for one, other in zip(wrong, want, strict=True))


@pytest.mark.parametrize("kind", ["x", "y", "w", "v"])
def test_an_input_that_nobody_set(built: Built, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def place(self: TorchContext, name: str, address: int) -> None:
        if not name.startswith(kind):
            self.places[name] = address

    monkeypatch.setattr(TorchContext, "place", place)
    with pytest.raises(AssertionError, match="lie nowhere"):
        story(session_of(built, built.runtime()))


@pytest.mark.parametrize(
    ("name", "changes"),
    [("w0", {"shape": (1, 1)}), ("x0", {"dtype": "float32"}), ("y0", {"output": False}), ("more", {})],
)
def test_an_engine_of_another_program(built: Built, name: str, changes: dict[str, Any]) -> None:
    runtime = built.runtime()
    load = runtime.load

    def other(file: Any) -> Any:
        engine = load(file)
        tensor = engine.tensors.get(name) or engine.tensors["x0"]
        engine.tensors = engine.tensors | {name: replace(tensor, **changes)}
        return engine

    runtime.load = other
    with pytest.raises(CorruptInputError, match=f"has other {name} than") as caught:
        session_of(built, runtime)
    assert "\n" not in caught.value.message


def test_an_engine_with_other_profiles(built: Built) -> None:
    blueprints = {key: replace(b, ranges=b.ranges[:1]) for key, b in built.builder.blueprints.items()}
    with pytest.raises(CorruptInputError, match="has other profiles than"):
        session_of(built, TorchRuntime(blueprints))


# When torch runs the segments, and what is said.


def refused(built: Built, capsys: pytest.CaptureFixture[str], runtime_for: Any) -> str:
    """What a user reads; the session answers all the same."""
    session = open_cuda(built.bundle, CPU, runtime_for)
    assert isinstance(session.runner.executor.segments, TorchSegments)
    session.open().decode(np.arange(3), np.array([2]))
    said = capsys.readouterr().err
    assert said.startswith("torch runs the segments: ")
    return " ".join(said.split())


def test_an_engine_that_does_not_load(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    class Refusing(TorchRuntime):
        def load(self, file: Any) -> Any:
            raise UnsupportedError(f"tensorrt_rtx cannot run {file.name} here: OLD_CUDA_DRIVER")

    assert "OLD_CUDA_DRIVER" in refused(built, capsys, lambda *_: Refusing({}))


def test_engines_that_cannot_run_such_calls(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    wide = built.bundle.manifest.engine.model_copy(update={"max_sequences": 9})
    manifest = built.bundle.manifest.model_copy(update={"engine": wide})
    longer = replace(built, bundle=built.bundle.model_copy(update={"manifest": manifest}))
    assert "calls of 32 tokens at most, and 36 may come" in refused(
        longer, capsys, lambda *_: built.runtime()
    )


def test_engines_that_are_not_compiled(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = built.bundle.manifest.model_copy(update={"unfinished": ("segments/a.engine",)})
    sealed = replace(built, bundle=built.bundle.model_copy(update={"manifest": manifest}))
    assert "still to be compiled" in refused(sealed, capsys, lambda *_: built.runtime())


def test_a_machine_without_a_gpu(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    assert "engines need a GPU" in refused(built, capsys, segment_choice.installed_runtime)


@pytest.fixture
def spark(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """As far as its name goes."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (12, 1))
    return torch.device("cuda", 0)


def test_the_library_that_built_them(built: Built, spark: torch.device) -> None:
    runtime = segment_choice.installed_runtime(built.bundle.manifest, spark)
    assert runtime.trt.__name__ == "tensorrt_rtx"
    assert runtime.compiled.path.name == f"{runtime.trt.__version__}-sm121.kernels"


def test_another_version_of_it(built: Built, spark: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    here = bundles.versions("tensorrt-rtx")
    monkeypatch.setattr(bundles, "versions", lambda _: here | {"tensorrt-rtx": "9.9"})
    with pytest.raises(
        UnsupportedError, match=r"built for tensorrt-rtx 1\..*, this machine has 9\.9"
    ) as caught:
        segment_choice.installed_runtime(built.bundle.manifest, spark)
    assert caught.value.hint.startswith("pip install tensorrt-rtx-cu13==1.")


def test_without_it(built: Built, spark: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(segment_choice.MODULES, "tensorrt-rtx", "no_such_library")
    with pytest.raises(UnsupportedError, match="does not start here"):
        segment_choice.installed_runtime(built.bundle.manifest, spark)
    here = bundles.versions("tensorrt-rtx")
    monkeypatch.setattr(bundles, "versions", lambda _: here | {"tensorrt-rtx": "none"})
    with pytest.raises(UnsupportedError, match="this machine has none"):
        segment_choice.installed_runtime(built.bundle.manifest, spark)


def test_another_gpu(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with pytest.raises(UnsupportedError, match=r"not for compute capability 9\.0"):
        segment_choice.installed_runtime(built.bundle.manifest, torch.device("cuda", 0))


def test_engines_take_no_memory_while_they_run(built: Built) -> None:
    """What recording them needs of the builder."""
    flag = built.builder.trt.BuilderFlag.REQUIRE_USER_ALLOCATION
    assert all(config.get_flag(flag) for config in built.builder.builder.configs)
    assert len(built.builder.builder.configs) == len(built.bundle.program.segments)


def test_an_engine_that_cannot_be_recorded(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    never = TorchRuntime(built.builder.blueprints, records=False)
    assert "cannot be part of a CUDA graph" in refused(built, capsys, lambda *_: never)
    assert len(never.contexts) == 1


def test_what_was_compiled_is_kept_at_the_end(built: Built) -> None:
    runtime = built.runtime()
    session = session_of(built, runtime)
    assert not runtime.kept
    del session
    gc.collect()
    assert runtime.kept == 1


# Profiles.


@given(st.integers(1, 9), st.integers(0, 3), st.integers(1, 99), st.data())
def test_the_narrowest_profile(sequences: int, drafts: int, chunk: int, data: st.DataObject) -> None:
    ranges = profiles(sequences, drafts, chunk)
    tokens = data.draw(st.integers(1, max(size.most for size in ranges)))
    chosen = ranges[narrowest(ranges, tokens)]
    assert chosen.least <= tokens <= chosen.most
    assert all(size.most < tokens or size.most >= chosen.most for size in ranges)


def test_a_call_in_no_profile() -> None:
    with pytest.raises(UnsupportedError, match="a call of 9 tokens, where engines take 8"):
        narrowest((Profile(1, 4, 4), Profile(1, 8, 8)), 9)


def test_steps_without_rows_run_no_engine(built: Built) -> None:
    runtime = built.runtime()
    session = session_of(built, runtime)
    session.open().decode(np.arange(3), np.array([], np.int64))
    idle = [engine for engine in runtime.loaded if not any(context.runs for context in engine.contexts)]
    *_, head = (step for step in session.runner.programs[0].steps if step.kind == "segment")
    assert session.runner.executor.segments.engines[head.engine] in idle
