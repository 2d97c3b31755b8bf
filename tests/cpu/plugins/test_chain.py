"""The chain operator: each of its steps is what the operator it stands for makes of the same values."""

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from step35_trt.dialects.onnx_chain_steps import ADD, EMBED, EXPERTS, GATED, LINEAR, NORM, ROWS
from tests.cpu.plugins import definition

ISAS = definition.available_isas()
VOCABULARY, INNER, EXPERTS_COUNT, TOP_K, EPS = 50, 64, 32, 3, 1e-5
relaxed = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Layer:
    """Half a MoE layer and what follows it, as one chain that gives every value it makes."""

    def __init__(self, seed, d, block):
        rng = np.random.default_rng(seed)
        self.d, self.block = d, block

        def weight(n, k):
            return definition.Weight.of(rng.standard_normal((n, k)), block)

        self.gate, self.up, self.down, self.head = (
            weight(INNER * 2, d),
            weight(INNER * 2, d),
            weight(d, INNER * 2),
            weight(77, d),
        )
        _, self.experts = definition.stacked(
            rng, EXPERTS_COUNT, d, INNER if INNER % block == 0 else block, block
        )
        self.codes = rng.integers(0, 256, (VOCABULARY, d)).astype(np.uint8)
        self.scales = rng.random((VOCABULARY, d // block)).astype(np.float32) / 128
        self.gamma = rng.standard_normal(d).astype(np.float32)
        self.router = rng.standard_normal((EXPERTS_COUNT, d)).astype(np.float32) / 8
        self.bias = rng.standard_normal(EXPERTS_COUNT).astype(np.float32) / 8
        self.fixed = {
            "codes": self.codes, "scales": self.scales, "gamma": self.gamma, "router": self.router,
            "bias": self.bias, **self.experts,
        }  # fmt: skip
        for name in ("gate", "up", "down", "head"):
            self.fixed |= {f"{name}.w": getattr(self, name).tiles, f"{name}.s": getattr(self, name).scales}

    def run(self, library, isa, ids, x, rows, threads=2):
        fed = {"ids": ids, "x": x, "rows": rows}
        names = [*fed, *self.fixed]
        made = [
            "embedded",
            "sum",
            "normed",
            "gate",
            "up",
            "logits",
            "shared",
            "routed",
            "mixed",
            "last",
            "head",
        ]
        at = {name: i for i, name in enumerate([*names, *(f"={name}" for name in made)])}
        steps = [
            [EMBED, "ids", "codes", "scales", self.block],
            [ADD, "=embedded", "x"],
            [NORM, "=sum", "gamma"],
            [LINEAR, "=normed", self.block, 3, "gate.w", "gate.s", INNER * 2, "up.w", "up.s", INNER * 2,
             "router", -1, EXPERTS_COUNT],
            [GATED, "=gate", "=up", self.block, "down.w", "down.s", self.d],
            [EXPERTS, "=normed", "=logits", "bias", "gu", "gus", "dn", "dns", self.block, TOP_K],
            [ADD, "=shared", "=routed"],
            [ROWS, "rows", "=mixed"],
            [LINEAR, "=last", self.block, 1, "head.w", "head.s", 77],
        ]  # fmt: skip
        ints = [at[v] if isinstance(v, str) else v for step in steps for v in step]
        reals = [EPS, 7.0, 3.0, 0.5]
        outputs = [at[f"={name}"] for name in made]
        session = chain(library, isa, fed, self.fixed, made, ints, reals, outputs, threads)
        return dict(zip(made, session.run(None, fed), strict=True))


def chain(library, isa, fed, fixed, made, steps, reals, outputs, threads=2):
    kinds = {np.dtype(np.int64): TensorProto.INT64, np.dtype(np.float32): TensorProto.FLOAT}
    values = [helper.make_tensor_value_info(n, kinds[v.dtype], [None] * v.ndim) for n, v in fed.items()]
    outs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None, None]) for n in made]
    node = helper.make_node(
        "Chain", [*fed, *fixed], made, domain="step35", steps=steps, reals=reals, results=outputs
    )
    held = [onnx.numpy_helper.from_array(v, n) for n, v in fixed.items()]
    return definition.loaded(library, isa, helper.make_graph([node], "g", values, outs, held), threads)


def inputs(seed, t, r, d):
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, max(t, 1), r if t else 0)
    return rng.integers(0, VOCABULARY, t), rng.standard_normal((t, d)).astype(np.float32), rows


@relaxed
@given(data=st.data(), seed=st.integers(0, 1 << 30))
def test_each_step_is_its_operator(library, data, seed):
    block = data.draw(st.sampled_from([16, 64]))
    d = block * data.draw(st.integers(1, 6))
    t, r = data.draw(st.sampled_from([0, 1, 2, 5, 70])), data.draw(st.integers(0, 3))
    layer, (ids, x, rows) = Layer(seed, d, block), inputs(seed + 1, t, r, d)
    results = [layer.run(library, isa, ids, x, rows) for isa in ISAS]
    got = results[0]
    for other in results[1:]:
        for name, value in got.items():
            np.testing.assert_array_equal(other[name], value, err_msg=name)

    codes = layer.codes[ids].astype(np.float32) - 128
    np.testing.assert_array_equal(got["embedded"], codes * np.repeat(layer.scales[ids], block, -1))
    np.testing.assert_array_equal(got["sum"], got["embedded"] + x)
    exact = got["sum"].astype(np.float64)
    exact /= np.sqrt((exact**2).mean(-1, keepdims=True) + EPS)
    np.testing.assert_allclose(got["normed"], exact * layer.gamma, rtol=2e-6, atol=1e-30)
    wide = np.abs(got["normed"]).astype(np.float64) @ np.abs(layer.router).T
    assert (np.abs(got["logits"] - got["normed"].astype(np.float64) @ layer.router.T) <= 1e-6 * wide).all()

    def operator(kind, weight, *values, **attributes):
        fixed = {"w": weight.tiles, "s": weight.scales}
        fed = {f"x{i}": v for i, v in enumerate(values)}
        made = definition.session(
            library, ISAS[0], kind, dict.fromkeys(fed), fixed, N=len(weight.values), block=block, **attributes
        )
        return made.run(None, fed)[0]

    np.testing.assert_array_equal(got["gate"], operator("Int4Linear", layer.gate, got["normed"]))
    np.testing.assert_array_equal(got["up"], operator("Int4Linear", layer.up, got["normed"]))
    shared = operator("Int4GatedLinear", layer.down, got["gate"], got["up"], limit=7.0)
    np.testing.assert_array_equal(got["shared"], shared)
    scores = (1 / (1 + np.exp(-got["logits"].astype(np.float64)))).astype(np.float32)
    fed = {"x": got["normed"], "selection": scores + layer.bias, "weights": scores}
    attributes = {"block": block, "top_k": TOP_K, "scale": 3.0, "limit": 0.5}
    experts = definition.session(
        library, ISAS[0], "Int4Experts", dict.fromkeys(fed), layer.experts, **attributes
    )
    routed = experts.run(None, fed)[0]
    np.testing.assert_allclose(got["routed"], routed, rtol=1e-5, atol=1e-5 * np.abs(routed).max(initial=0))
    np.testing.assert_array_equal(got["mixed"], got["shared"] + got["routed"])
    np.testing.assert_array_equal(got["last"], got["mixed"][rows])
    np.testing.assert_array_equal(got["head"], operator("Int4Linear", layer.head, got["last"]))


@pytest.mark.parametrize("isa", ISAS)
def test_a_row_does_not_depend_on_its_batch_nor_on_threads(library, isa):
    layer, (ids, x, rows) = Layer(3, 1088, 64), inputs(4, 70, 70, 1088)
    rows = np.arange(70)
    whole = layer.run(library, isa, ids, x, rows)
    alone = layer.run(library, isa, ids, x, rows, threads=1)
    for name, value in whole.items():
        np.testing.assert_array_equal(alone[name], value, err_msg=name)
    for first, size in ((0, 1), (69, 1), (3, 2), (10, 4), (20, 7)):
        part = slice(first, first + size)
        got = layer.run(library, isa, ids[part], x[part], np.arange(size))
        for name, value in whole.items():
            np.testing.assert_array_equal(got[name], value[part], err_msg=name)


WRONG = {
    "a value that is not there": ([ADD, 0, 9], "value that is not there"),
    "a result before it is made": ([ADD, 0, 2], "value that is not there"),
    "widths that differ": ([ADD, 0, 1], "do not fit together"),
    "no such kind": ([17, 0, 0], "no known kind"),
    "steps that end early": ([ADD, 0], "end early"),
    "no vector": ([NORM, 0, 1], "another width"),
    "a number that is missing": ([NORM, 0, 2, NORM, 3, 2], "reals end early"),
    "a block that does not divide": ([LINEAR, 1, 64, 1, 0, -1, 2], "does not divide its columns"),
    "no products": ([LINEAR, 0, 16, 0], "no or too many products"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_steps_are_refused(library, case):
    steps, message = WRONG[case]
    fed = {"a": np.ones((2, 32), np.float32), "b": np.ones((2, 48), np.float32)}
    fixed = {"gamma": np.ones(32, np.float32)} if "number" in case else {}
    made = chain(library, ISAS[0], fed, fixed, ["y"], steps, [1e-5], [2 + len(fixed)])
    with pytest.raises(Exception, match=message):
        made.run(None, fed)


@pytest.mark.parametrize("index", [-1, 2])
def test_rows_out_of_range_are_refused(library, index):
    fed = {"x": np.ones((2, 32), np.float32), "rows": np.array([0, index])}
    with pytest.raises(Exception, match="out of range"):
        chain(library, ISAS[0], fed, {}, ["y"], [ROWS, 1, 0], [0.0], [2]).run(None, fed)
