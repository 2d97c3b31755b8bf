"""The tensorrt dialect in TensorRT-RTX, which builds for GPUs that are not here."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step35_trt import model
from step35_trt.config import Step35Config
from step35_trt.dialects.tensorrt import ConstantWeights, InputWeights, NoPlugins, TensorRtOps
from step35_trt.dialects.tensorrt_functional import Functional
from step35_trt.dialects.tensorrt_segment import Builder, Profile, profiles
from step35_trt.errors import UnsupportedError
from step35_trt.interpret.network import evaluate
from step35_trt.nano.geometry import raw_config as nano_config
from step35_trt.quantize.formats import Coding
from step35_trt.segments import Segment, cut
from step35_trt.signatures import Type
from step35_trt.trace import Trace, trace_decoder, trace_mtp
from step35_trt.weight_forms import NUMPY, Forms, Packed, WeightForm, pack
from tests.forms import RECIPES, forms
from tests.synthetic import raw_config

SMALL = Step35Config.parse(raw_config())
NANO = Step35Config.parse(nano_config([1]))


@cache
def builder() -> Builder:
    return Builder.rtx()


def traces(config: Step35Config, given_forms: Forms) -> list[Trace]:
    modules = range(config.num_nextn_predict_layers)
    return [trace_decoder(config, given_forms), *(trace_mtp(config, given_forms, k) for k in modules)]


def segments(config: Step35Config, given_forms: Forms) -> dict[str, Segment]:
    parts = [part for trace in traces(config, given_forms) for part in cut(trace)]
    return {part.key(given_forms): part for part in parts if isinstance(part, Segment)}


BUILT: dict[str, int] = {}


@pytest.mark.parametrize("recipe", RECIPES)
def test_nano_builds_for_spark(recipe: str) -> None:
    """The whole decoder and all modules, for a GPU that this machine does not have."""
    given_forms = forms(NANO, recipe)
    for key, segment in segments(NANO, given_forms).items():
        if key not in BUILT:  # recipes share what is the same
            written = builder().write(segment, given_forms)
            BUILT[key] = len(builder().build(written, (Profile(1, 16, 64),), "12.1").data)
        assert BUILT[key] > 10_000


def test_an_engine_is_nearly_the_same_every_time() -> None:
    """TensorRT-RTX leaves a few bytes to chance: what a resumed build may differ in."""
    given_forms = forms(NANO, "int4-awq")
    segment = next(iter(segments(NANO, given_forms).values()))
    first, second = (
        builder().build(builder().write(segment, given_forms), (Profile(1, 4, 16),), "12.1") for _ in range(2)
    )
    assert len(first.data) == len(second.data)
    assert sum(a != b for a, b in zip(first.data, second.data, strict=True)) < 100


def test_both_profiles_go_into_one_engine() -> None:
    given_forms = forms(NANO, "bf16")
    written = builder().write(next(iter(segments(NANO, given_forms).values())), given_forms)
    assert builder().build(written, profiles(4, 3, 64), "12.1").data


def test_profiles_reach_from_one_token_to_a_chunk() -> None:
    decode, prefill = profiles(sequences=8, draft_tokens=3, prefill_chunk=512)
    assert (decode.least, decode.most) == (1, 32)
    assert (prefill.least, prefill.mostly, prefill.most) == (1, 512, 512)
    assert profiles(sequences=1, draft_tokens=0, prefill_chunk=64)[0] == Profile(1, 1, 1)


def test_an_unknown_gpu_is_refused() -> None:
    written = Functional(builder().trt, builder().network(), lambda: "model")
    with pytest.raises(UnsupportedError, match=r"builds no engine here for compute capability 9\.0"):
        builder().build(written, (), "9.0")


def random_weight(name: str, form: WeightForm) -> Packed:
    rng = np.random.default_rng(len(name))
    if len(form.shape) == 1:
        return Packed(rng.normal(size=form.shape).astype(np.float32))
    return pack(rng.normal(size=form.shape).astype(np.float32), form)


def inputs_of(segment: Segment, given_forms: Forms) -> dict[str, np.ndarray]:
    """Random activations, and weights under their aliases."""
    rng = np.random.default_rng(7)
    given_inputs: dict[str, np.ndarray] = {}
    for i, value in enumerate(segment.inputs):
        shape = (5, value.type.width) if value.type.width else (5,)
        drawn = rng.integers(0, 90, shape) if value.type.dtype == "int64" else rng.normal(size=shape)
        given_inputs[f"x{i}"] = drawn.astype(NUMPY[value.type.dtype])
    alias = segment.alias()
    for name in segment.matrices:
        packed = random_weight(name, given_forms(name))
        given_inputs[alias[name]] = packed.values
        if packed.scales is not None:
            given_inputs[f"{alias[name]}.scales"] = packed.scales
    for vector in segment.vectors:
        values = random_weight(vector.name, given_forms(vector.name)).values
        given_inputs[alias[vector.name]] = (values + np.float32(vector.plus))[None]
    return given_inputs


@pytest.mark.parametrize("recipe", ["bf16", "fp8", "int4-awq"])
def test_constants_compute_what_inputs_do(recipe: str) -> None:
    given_forms = forms(NANO, recipe)
    for segment in segments(NANO, given_forms).values():
        bound = builder().write(segment, given_forms)
        alias = InputWeights(segment.alias().__getitem__)
        fixed = builder().write(segment, given_forms, ConstantWeights(random_weight, alias))
        values = inputs_of(segment, given_forms)
        rows = 2 if any(given_forms(name).dtype == "int8" for name in segment.matrices) else 0
        assert fixed.network.num_inputs == len(segment.inputs) + rows
        want = evaluate(bound.trt, bound.network, values, bound.constants)
        got = evaluate(fixed.trt, fixed.network, values, fixed.constants)
        assert list(got) == list(want) == [f"y{i}" for i in range(len(segment.outputs))]
        for name, expected in want.items():
            assert np.isfinite(expected.astype(np.float32)).all()
            np.testing.assert_array_equal(got[name], expected)


def test_constants_build() -> None:
    given_forms = forms(NANO, "int4-awq")
    for segment in list(segments(NANO, given_forms).values())[:3]:
        written = builder().write(segment, given_forms, ConstantWeights(random_weight))
        engine = builder().build(written, (Profile(1, 4, 16),), "12.1")
        weights = [given_forms(name) for name in segment.matrices]
        assert len(engine.data) > sum(form.nbytes for form in weights if form.dtype != "int8")


@given(
    rows=st.integers(1, 5).map(lambda n: 16 * n),
    columns=st.sampled_from([32, 64, 96, 128]),
    kind=st.sampled_from(["bf16", "fp8-rows", "fp8-blocks", "int4"]),
    activation=st.sampled_from(["bfloat16", "float32"]),
    tokens=st.integers(1, 6),
)
@settings(deadline=None, max_examples=40)
def test_a_product_is_that_of_the_decoded_weight(
    rows: int, columns: int, kind: str, activation: str, tokens: int
) -> None:
    """Against numpy in fp64: scales are applied along the right axis and the weight is transposed."""
    coding = Coding(kind, 16 if kind in ("int4", "fp8-blocks") else 0)  # type: ignore[arg-type]
    given_forms = Forms({"w.weight": (rows, columns)}, lambda _: coding, activation)  # type: ignore[arg-type]
    rng = np.random.default_rng(rows * columns + tokens)
    # Every block has a scale of its own by far.
    weight = rng.normal(size=(rows, columns)) * 4.0 ** rng.integers(
        -3, 3, (rows // 16, columns // 16)
    ).repeat(16, 0).repeat(16, 1)
    packed = pack(weight.astype(np.float32), given_forms("w.weight"))
    f = Functional(builder().trt, builder().network(), lambda: "test")
    ops = TensorRtOps(f, given_forms, InputWeights(), NoPlugins())
    x = ops.input("x", Type(activation, columns, "tokens"))  # type: ignore[arg-type]
    f.output("y", ops.linear(x, "w.weight").handle)
    values = rng.normal(size=(tokens, columns)).astype(NUMPY[activation])
    given_inputs = {"x": values, "w.weight": packed.values}
    if packed.scales is not None:
        given_inputs["w.weight.scales"] = packed.scales
    got = evaluate(f.trt, f.network, given_inputs, f.constants)["y"].astype(np.float64)
    want = values.astype(np.float64) @ weight.T
    error = {"bf16": 0.01, "fp8-rows": 0.08, "fp8-blocks": 0.08, "int4": 0.2}[kind]
    assert np.linalg.norm(got - want) <= error * np.linalg.norm(want)


def direct(given_forms: Forms) -> TensorRtOps:
    return TensorRtOps(
        Functional(builder().trt, builder().network(), lambda: "direct"),
        given_forms,
        InputWeights(),
        NoPlugins(),
    )


def test_a_host_without_plugins_says_so() -> None:
    ops = direct(forms(SMALL, "bf16"))
    ids, rows = (ops.input(kind, Type("int64", 0, kind)) for kind in ("tokens", "rows"))  # type: ignore[arg-type]
    with pytest.raises(
        UnsupportedError, match="gated_attention is a plugin and tensorrt_rtx hosts none"
    ) as error:
        model.decoder(ops, SMALL, ids, rows)
    assert "segments" in error.value.hint


def test_a_mismatch_names_module_and_line() -> None:
    """TensorRT itself takes both of these without a word."""
    ops = direct(forms(SMALL, "bf16"))
    x = ops.input("x", Type("float32", 64, "tokens"))
    with pytest.raises(
        UnsupportedError,
        match=r"^model\.layers\.0\.mlp \(model\.py:\d+\): linear: .* bfloat16 \[tokens, 64\] is",
    ):
        model.mlp(ops, "model.layers.0.mlp", 0.0, x)
    a, b = (ops.f.input(name, dtype, (-1, 8)) for name, dtype in (("a", "bfloat16"), ("b", "float32")))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="direct: SUM takes operands of one type, not BF16 and FLOAT"):
        ops.f.add(a, b)
    with pytest.raises(UnsupportedError, match="the operands' shapes do not fit"):
        ops.f.add(a, ops.f.input("c", "bfloat16", (-1, 9)))


def test_a_cut_block_is_refused() -> None:
    given_forms = Forms({"w.weight": (24, 32)}, lambda _: Coding("fp8-blocks", 16), "bfloat16")
    ops = direct(given_forms)
    with pytest.raises(UnsupportedError, match=r"\[24, 32\] is not made of whole blocks of \[16, 16\]"):
        ops.linear(ops.input("x", Type("bfloat16", 32, "tokens")), "w.weight")
