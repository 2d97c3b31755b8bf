"""The chain operator: each of its steps is what the operator it stands for makes of the same values."""

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from step35_trt.dialects.onnx_chain_steps import ADD, ATTEND, DROP, EMBED, EXPERTS, GATED, LINEAR, NORM, ROWS
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

    def run(self, library, isa, ids, x, rows, threads=2, only=None):
        """What it makes; with `only`, that and nothing else, and memory is reused as soon as it can be."""
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
        if only:
            last = {v: i for i, step in enumerate(steps) for v in step if str(v).startswith("=")}
            for v, i in sorted(last.items(), key=lambda item: -item[1]):
                steps.insert(i + 1, [DROP, v])
            made = [only]
        ints = [at[v] if isinstance(v, str) else v for step in steps for v in step]
        reals = [EPS, 7.0, 3.0, 0.5]
        outputs = [at[f"={name}"] for name in made]
        session = chain(library, isa, fed, self.fixed, made, ints, reals, outputs, threads)
        return dict(zip(made, session.run(None, fed), strict=True))


def chain(library, isa, fed, fixed, made, steps, reals, outputs, threads=2):
    attributes = {"steps": steps, "reals": reals, "results": outputs}
    return built(library, isa, "Chain", fed, fixed, made, threads, **attributes)


def built(library, isa, op, fed, fixed, made, threads=2, names=None, **attributes):
    """One operator of inputs of any kind."""
    kinds = {np.dtype(np.int64): TensorProto.INT64, np.dtype(np.float32): TensorProto.FLOAT}
    values = [helper.make_tensor_value_info(n, kinds[v.dtype], [None] * v.ndim) for n, v in fed.items()]
    outs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in made]
    node = helper.make_node(op, names or [*fed, *fixed], made, domain="step35", **attributes)
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


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("t", [1, 3, 70])
def test_memory_that_is_used_again_changes_nothing(library, isa, t):
    layer, given = Layer(5, 192, 64), inputs(6, t, 2, 192)
    whole = layer.run(library, isa, *given)
    for name in ("head", "routed"):
        got = layer.run(library, isa, *given, only=name)
        np.testing.assert_array_equal(got[name], whole[name], err_msg=name)


class Attentions:
    """Two attentions, of which the second reads what the first gives, over caches of their own."""

    HEADS, GROUPS, D, PAGE = 6, 2, 32, 64

    def __init__(self, seed, lengths, pasts, windows):
        rng = np.random.default_rng(seed)
        self.windows, t = windows, sum(lengths)
        width, per_page = self.HEADS * self.D, self.GROUPS * self.D
        pages = [-(-(past + length) // self.PAGE) for past, length in zip(pasts, lengths, strict=True)]
        table = np.full((len(lengths), max(pages)), -1)
        for row, count, first in zip(table, pages, np.cumsum([0, *pages]), strict=False):
            row[:count] = first + np.arange(count)
        sizes = {"q": width, "k": per_page, "v": per_page, "gate": self.HEADS}
        self.fed = {name: rng.standard_normal((t, size)).astype(np.float32) for name, size in sizes.items()}
        self.batch = {"table": table, "starts": np.cumsum([0, *lengths]), "pasts": np.array(pasts)}
        shape = (sum(pages) + 1, self.GROUPS, self.PAGE, self.D)
        self.caches = [[rng.standard_normal(shape).astype(np.float32) for _ in "kv"] for _ in windows]
        self.fixed = {
            "qg": rng.standard_normal(self.D).astype(np.float32),
            "kg": rng.standard_normal(self.D).astype(np.float32),
            "f": rng.random(self.D // 4).astype(np.float32),
        }

    def operator(self, library, isa, q, layer):
        """`GatedAttention` alone: its three outputs."""
        fed = self.fed | {"q": q} | dict(zip(("pk", "pv"), self.caches[layer], strict=True)) | self.batch
        names = ["q", "k", "v", "gate", "qg", "kg", "f", "pk", "pv", "table", "starts", "pasts"]
        return built(
            library, isa, "GatedAttention", fed, self.fixed, ("y", "nk", "nv"), names=names,
            window=self.windows[layer], eps=EPS,
        ).run(None, fed)  # fmt: skip

    def chained(self, library, isa):
        """Both in one chain, with what they give added to itself in between, and its memory used again."""
        caches = {f"{n}{i}": c for i, pair in enumerate(self.caches) for n, c in zip("kv", pair, strict=True)}
        caches = {f"p{name}": cache for name, cache in caches.items()}
        fed = self.fed | caches | self.batch
        made = ["y0", "k0", "v0", "twice", "y1", "k1", "v1", "sum"]
        at = {name: i for i, name in enumerate([*fed, *self.fixed, *(f"={name}" for name in made)])}
        rest = ["k", "v", "gate", "qg", "kg", "f"]
        steps = [
            [ATTEND, "q", *rest, "pk0", "pv0", "table", "starts", "pasts", self.windows[0]],
            [ADD, "=y0", "=y0"],
            [DROP, "=y0"],
            [ATTEND, "=twice", *rest, "pk1", "pv1", "table", "starts", "pasts", self.windows[1]],
            [ADD, "=y1", "=twice"],
        ]
        ints = [at[v] if isinstance(v, str) else v for step in steps for v in step]
        outs = ["k0", "v0", "k1", "v1", "sum"]
        session = chain(
            library, isa, fed, self.fixed, outs, ints, [EPS, EPS], [at[f"={name}"] for name in outs]
        )
        return dict(zip(outs, session.run(None, fed), strict=True))


CALLS = {
    "one token": ([1], [0]),
    "a token far in": ([1], [2100]),
    "a prompt": ([130], [0]),
    "several": ([3, 1, 40], [1500, 64, 63]),
    "nothing": ([0], [5]),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("call", CALLS)
def test_attention_is_its_operator(library, isa, call):
    both = Attentions(7, *CALLS[call], windows=(0, 100))
    got = both.chained(library, isa)
    y, k, v = both.operator(library, isa, both.fed["q"], 0)
    np.testing.assert_array_equal(got["k0"], k)
    np.testing.assert_array_equal(got["v0"], v)
    y1, k, v = both.operator(library, isa, y + y, 1)
    np.testing.assert_array_equal(got["k1"], k)
    np.testing.assert_array_equal(got["v1"], v)
    np.testing.assert_array_equal(got["sum"], y1 + (y + y))


def test_caches_must_be_results(library):
    both = Attentions(8, [2], [0], windows=(0, 0))
    fed = both.fed | {"pk": both.caches[0][0], "pv": both.caches[0][1]} | both.batch
    names = [*fed, *both.fixed]
    takes = ["q", "k", "v", "gate", "qg", "kg", "f", "pk", "pv", "table", "starts", "pasts"]
    steps = [ATTEND, *(names.index(name) for name in takes), 0]
    made = chain(library, ISAS[0], fed, both.fixed, ["y"], steps, [EPS], [len(names)])
    with pytest.raises(Exception, match="a cache is no output"):
        made.run(None, fed)


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
