"""The CPU operator against specification 2.4 in fp64: any packed calls, any pages, any instruction set."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from tests.cpu.plugins import definition

ISAS = definition.available_isas()
EPS = 1e-5
PAGE = 64
UNUSED = -1  # no page
relaxed = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@dataclass(frozen=True)
class Layer:
    heads: int
    groups: int
    d: int
    window: int
    frequencies: np.ndarray
    gammas: tuple[np.ndarray, np.ndarray]

    @classmethod
    def random(cls, rng, heads, groups, d, window, rotated):
        frequencies = (rng.random(rotated // 2) * 2).astype(np.float32)
        gammas = tuple((1 + rng.normal(0, 0.3, d)).astype(np.float32) for _ in range(2))
        return cls(heads, groups, d, window, frequencies, gammas)

    def inputs(self, rng, t):
        widths = (self.heads * self.d, self.groups * self.d, self.groups * self.d, self.heads)
        return tuple(rng.standard_normal((t, w)).astype(np.float32) * 2 for w in widths)


def norm(x, gamma):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * gamma


def rotate(x, positions, frequencies):
    # Angles are fp32 in every implementation; what follows is exact.
    angle = (positions.astype(np.float32)[:, None] * frequencies).astype(np.float64)[:, None]
    half = len(frequencies)
    low, high, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    c, s = np.cos(angle), np.sin(angle)
    return np.concatenate([low * c - high * s, high * c + low * s, rest], -1)


def expected(layer, q, k, v, gate):
    """All tokens of a sequence at once, fp64."""
    t, d = len(q), layer.d
    positions = np.arange(t)
    q = rotate(
        norm(q.astype(float).reshape(t, layer.heads, d), layer.gammas[0]), positions, layer.frequencies
    )
    k = rotate(
        norm(k.astype(float).reshape(t, layer.groups, d), layer.gammas[1]), positions, layer.frequencies
    )
    v = v.astype(float).reshape(t, layer.groups, d)
    per = layer.heads // layer.groups
    scores = np.einsum("thd,shd->hts", q, k.repeat(per, 1)) / np.sqrt(d)
    seen = positions[:, None] >= positions
    if layer.window:
        seen &= positions > positions[:, None] - layer.window
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True, initial=-1e30))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("hts,shd->thd", weights, v.repeat(per, 1))
    return (out / (1 + np.exp(-gate.astype(float)))[..., None]).reshape(t, layer.heads * d)


@dataclass
class Pool:
    """An operator over pages, bound in place as a session binds them."""

    library: object
    isa: str
    layer: Layer
    pages: int
    page: int = PAGE
    threads: int = 2
    fill: float = np.nan  # nothing may read what was never written
    session: ort.InferenceSession = field(init=False)

    def __post_init__(self):
        names = ["q", "k", "v", "gate", "qg", "kg", "f", "pk", "pv", "table", "starts", "pasts"]
        ranks = [2, 2, 2, 2, 1, 1, 1, 4, 4, 2, 1, 1]
        kinds = [TensorProto.FLOAT] * 9 + [TensorProto.INT64] * 3
        values = [
            helper.make_tensor_value_info(n, kind, [None] * r)
            for n, r, kind in zip(names, ranks, kinds, strict=True)
        ]
        outs = [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * r)
            for n, r in (("y", 2), ("nk", 4), ("nv", 4))
        ]
        node = helper.make_node(
            "GatedAttention", names, ["y", "nk", "nv"], domain="step35", window=self.layer.window, eps=EPS
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("step35", 1)]
        graph = helper.make_graph([node], "g", values, outs)
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 4
        options.register_custom_ops_library(str(self.library))
        before = os.environ.get("STEP35_CPU_ISA")
        os.environ["STEP35_CPU_ISA"] = self.isa
        try:
            model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
            self.session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        finally:
            if before is None:
                del os.environ["STEP35_CPU_ISA"]
            else:
                os.environ["STEP35_CPU_ISA"] = before
        shape = (self.pages, self.layer.groups, self.page, self.layer.d)
        self.keys, self.values = (np.full(shape, self.fill, np.float32) for _ in range(2))

    def fed(self, table, pasts, parts):
        """`parts` are the sequences' q, k, v and gate."""
        lengths = [len(part[0]) for part in parts]
        packed = [np.concatenate(x) for x in zip(*parts, strict=True)]
        batch = [np.atleast_2d(table), np.cumsum([0, *lengths]), np.array(pasts)]
        weights = [*self.layer.gammas, self.layer.frequencies, self.keys, self.values]
        held = [*packed, *weights, *(x.astype(np.int64) for x in batch)]
        names = [value.name for value in self.session.get_inputs()]
        return dict(zip(names, map(np.ascontiguousarray, held), strict=True)), lengths

    def run(self, table, pasts, parts):
        """The output of each sequence."""
        fed, lengths = self.fed(table, pasts, parts)
        binding, y = self.session.io_binding(), np.full(fed["q"].shape, np.nan, np.float32)
        for name, x in fed.items():
            binding.bind_cpu_input(name, x)
        for name, x in (("y", y), ("nk", self.keys), ("nv", self.values)):
            binding.bind_output(name, "cpu", 0, np.float32, x.shape, x.ctypes.data)
        self.session.run_with_iobinding(binding)
        return np.split(y, np.cumsum(lengths[:-1]))

    def one(self, past, *part):
        """A sequence alone that owns all pages in order."""
        return self.run(np.arange(self.pages), [past], [part])[0]


def close(got, want):
    return np.abs(got - want).max(initial=0) <= 2e-5 * max(1.0, np.abs(want).max(initial=0))


def cut(tokens, begin, end):
    return tuple(x[begin:end] for x in tokens)


@relaxed
@given(data=st.data(), seed=st.integers(0, 1 << 30))
def test_any_packed_calls_and_rollbacks_give_the_definition(library, data, seed):
    """Ragged batches over scattered pages; window layers lose the pages that nobody will see again."""
    rng = np.random.default_rng(seed)
    groups, per = data.draw(st.sampled_from([(1, 8), (2, 12), (8, 1), (3, 5), (1, 64)]), "heads")
    d = data.draw(st.sampled_from([16, 48, 64, 128]), "d")
    rotated = data.draw(st.sampled_from([d, d // 2, 6, 0]), "rotated")
    window = data.draw(st.sampled_from([0, 1, 7, 16, 33, 70, 130]), "window")
    page = data.draw(st.sampled_from([64, 128]), "page")
    layer = Layer.random(rng, groups * per, groups, d, window, rotated)
    sequences = data.draw(st.integers(1, 4), "sequences")
    size = st.one_of(st.integers(0, 4), st.integers(5, 80), st.sampled_from([63, 64, 65, 128, 129]))
    calls = data.draw(
        st.lists(st.lists(size, min_size=sequences, max_size=sequences), min_size=1, max_size=6)
    )
    totals = np.sum(calls, axis=0)
    width = -(-(int(totals.max()) + 4) // page)
    tokens = [layer.inputs(rng, int(total)) for total in totals]
    want = [expected(layer, *part) for part in tokens]
    scattered = rng.permutation(sequences * width).reshape(sequences, width)
    pools = [Pool(library, isa, layer, sequences * width, page) for isa in ISAS]
    done = np.zeros(sequences, int)
    for sizes in calls:
        # Drafts that are taken back: what they wrote must not be seen.
        junk = [layer.inputs(rng, data.draw(st.integers(0, 3), "junk")) for _ in sizes]
        parts = [
            tuple(
                np.concatenate(pair)
                for pair in zip(cut(tokens[s], done[s], done[s] + n), junk[s], strict=True)
            )
            for s, n in enumerate(sizes)
        ]
        table = scattered.copy()
        for s in range(sequences):
            if window:
                table[s, : max(done[s] - window + 1, 0) // page] = UNUSED
            table[s, -(-(done[s] + len(parts[s][0])) // page) :] = UNUSED
        outs = [pool.run(table, done, parts) for pool in pools]
        for s, n in enumerate(sizes):
            assert close(outs[0][s][:n], want[s][done[s] : done[s] + n])
            for out in outs[1:]:
                np.testing.assert_array_equal(out[s][:n], outs[0][s][:n])
        done += sizes


@relaxed
@given(data=st.data(), seed=st.integers(0, 1 << 30))
def test_bits_depend_on_the_sequence_alone(library, data, seed):
    """However a sequence is cut into calls and whoever shares them: past one chunk and far past."""
    rng = np.random.default_rng(seed)
    window = data.draw(st.sampled_from([0, 100, 1500]), "window")
    layer = Layer.random(rng, 8, 2, 16, window, 16)
    total = data.draw(st.sampled_from([90, 1023, 1025, 2300]), "total")
    width = total // PAGE + 1
    tokens = layer.inputs(rng, total)
    alone = Pool(library, ISAS[-1], layer, width, threads=1).one(0, *tokens)
    shared = Pool(library, ISAS[-1], layer, 2 * width)
    own, other = np.arange(2 * width).reshape(2, width)
    done, others, parts = 0, 0, []
    while done < total:
        size = min(data.draw(st.one_of(st.integers(1, 9), st.integers(1, total))), total - done)
        beside = min(data.draw(st.integers(0, 12)), total - others)
        calls = [cut(tokens, done, done + size), cut(tokens, others, others + beside)]
        parts.append(shared.run(np.array([own, other]), [done, others], calls)[0])
        done, others = done + size, others + beside
    np.testing.assert_array_equal(np.concatenate(parts), alone)


@pytest.mark.parametrize("window", [0, 512])
def test_long_contexts_are_cut_into_chunks(library, window):
    """One token after 2,500: three chunks of keys, put together; alone, with others and on one thread."""
    rng = np.random.default_rng(3)
    layer = Layer.random(rng, 2, 1, 32, window, 16)
    tokens = layer.inputs(rng, 2504)
    want = expected(layer, *tokens)
    pool = Pool(library, ISAS[-1], layer, 40)
    for start in range(0, 2500, 500):
        assert close(pool.one(start, *cut(tokens, start, start + 500)), want[start : start + 500])
    together = pool.one(2500, *cut(tokens, 2500, 2504))
    assert close(together, want[2500:])
    alone = Pool(library, ISAS[-1], layer, 40, threads=1)
    alone.keys, alone.values = pool.keys, pool.values
    for i in range(4):
        part = cut(tokens, 2500 + i, 2501 + i)
        np.testing.assert_array_equal(pool.one(2500 + i, *part)[0], together[i])
        np.testing.assert_array_equal(alone.one(2500 + i, *part)[0], together[i])


def test_the_window_counts_the_token_itself(library):
    """Window 7 against 8: the definition tells them apart, and so must the operator."""
    rng = np.random.default_rng(5)
    layer = Layer.random(rng, 4, 1, 16, 7, 16)
    tokens = layer.inputs(rng, 40)
    got = Pool(library, ISAS[0], layer, 1).one(0, *tokens)
    assert close(got, expected(layer, *tokens))
    wider = Layer(4, 1, 16, 8, layer.frequencies, layer.gammas)
    assert not close(got, expected(wider, *tokens))


def test_positions_are_exact_far_out(library):
    """At position 262,000 the angles are still those of fp32 arithmetic."""
    rng = np.random.default_rng(6)
    layer = Layer.random(rng, 2, 1, 16, 16, 16)
    tokens = layer.inputs(rng, 20)
    far = 262_000
    table = np.full(far // PAGE + 2, UNUSED)
    table[(far - 15) // PAGE :] = np.arange(len(table) - (far - 15) // PAGE)
    got = Pool(library, ISAS[-1], layer, 4, fill=0.0).run(table, [far], [tokens])[0]
    q, k, v, gate = (x.astype(float) for x in tokens)
    at = np.arange(far, far + 20)
    q = rotate(norm(q.reshape(20, 2, 16), layer.gammas[0]), at, layer.frequencies)[-1]
    k = rotate(norm(k.reshape(20, 1, 16), layer.gammas[1]), at, layer.frequencies)[4:, 0]
    weights = np.exp(q @ k.T / 4)
    out = weights / weights.sum(-1, keepdims=True) @ v[4:]
    want = (out / (1 + np.exp(-gate[-1]))[:, None]).reshape(-1)
    assert close(got[-1], want)


def test_pages_of_others_are_copied_first(library):
    """Outputs that are not bound to the inputs' memory get the rows of before."""
    rng = np.random.default_rng(7)
    layer = Layer.random(rng, 8, 2, 16, 0, 8)
    tokens = layer.inputs(rng, 30)
    pool = Pool(library, ISAS[-1], layer, 1)
    first = pool.one(0, *cut(tokens, 0, 20))
    fed, _ = pool.fed(np.arange(1), [20], [cut(tokens, 20, 30)])
    second = pool.session.run(["y"], fed)[0]
    assert close(np.concatenate([first, second]), expected(layer, *tokens))


def test_a_call_without_tokens(library):
    layer = Layer.random(np.random.default_rng(9), 2, 1, 16, 0, 16)
    pool = Pool(library, ISAS[-1], layer, 1)
    nothing = layer.inputs(np.random.default_rng(9), 0)
    assert pool.run(np.array([[UNUSED], [0]]), [5, 0], [nothing, nothing])[0].shape == (0, 32)


WRONG = {
    "a page that is none": ([[0, 1, UNUSED]], [100], [0, 40]),
    "a page beyond the pool": ([[0, 1, 3]], [100], [0, 40]),
    "a table that is too narrow": ([[0, 1]], [100], [0, 40]),
    "tokens of nobody": ([[0, 1, 2]], [100], [0, 39]),
    "a negative past": ([[0, 1, 2]], [-1], [0, 40]),
    "starts that go back": ([[0, 1, 2]] * 2, [0, 0], [0, 50, 40]),
}


@pytest.mark.parametrize("what", list(WRONG))
def test_sequences_without_their_pages_are_refused(library, what):
    rng = np.random.default_rng(8)
    layer = Layer.random(rng, 2, 1, 16, 0, 16)
    pool = Pool(library, ISAS[-1], layer, 3, fill=0.0)
    fed, _ = pool.fed(np.arange(3), [100], [layer.inputs(rng, 40)])
    pool.session.run(["y"], fed)
    table, pasts, starts = (np.array(x, np.int64) for x in WRONG[what])
    with pytest.raises(Exception, match="pages are not there"):
        pool.session.run(["y"], fed | {"table": table, "pasts": pasts, "starts": starts})
