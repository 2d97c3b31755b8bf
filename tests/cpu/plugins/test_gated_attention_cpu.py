"""The CPU operator against specification 2.4 in fp64: any calls, any cache, any instruction set."""

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
relaxed = settings(
    max_examples=25,
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
class Cache:
    """An operator over a cache of its own, bound in place as a session binds it."""

    library: object
    isa: str
    layer: Layer
    capacity: int
    threads: int = 2
    fill: float = np.nan  # nothing may read what was never written
    session: ort.InferenceSession = field(init=False)

    def __post_init__(self):
        names = ["q", "k", "v", "gate", "qg", "kg", "f", "pk", "pv", "past"]
        ranks = [2, 2, 2, 2, 1, 1, 1, 4, 4, 1]
        kinds = [TensorProto.FLOAT] * 9 + [TensorProto.INT64]
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
        shape = (1, self.layer.groups, self.capacity, self.layer.d)
        self.keys, self.values = (np.full(shape, self.fill, np.float32) for _ in range(2))

    def run(self, past, q, k, v, gate):
        fed = [q, k, v, gate, *self.layer.gammas, self.layer.frequencies, self.keys, self.values]
        binding, y = self.session.io_binding(), np.full(q.shape, np.nan, np.float32)
        held = [np.ascontiguousarray(x) for x in (*fed, np.array([past]))]
        for value, x in zip(self.session.get_inputs(), held, strict=True):
            binding.bind_cpu_input(value.name, x)
        for name, x in (("y", y), ("nk", self.keys), ("nv", self.values)):
            binding.bind_output(name, "cpu", 0, np.float32, x.shape, x.ctypes.data)
        self.session.run_with_iobinding(binding)
        return y


def close(got, want):
    return np.abs(got - want).max(initial=0) <= 2e-5 * max(1.0, np.abs(want).max(initial=0))


@relaxed
@given(data=st.data(), seed=st.integers(0, 1 << 30))
def test_any_calls_and_rollbacks_give_the_definition(library, data, seed):
    rng = np.random.default_rng(seed)
    groups, per = data.draw(st.sampled_from([(1, 8), (2, 12), (8, 1), (3, 5), (1, 64)]), "heads")
    d = data.draw(st.sampled_from([16, 48, 64, 128]), "d")
    rotated = data.draw(st.sampled_from([d, d // 2, 6, 0]), "rotated")
    window = data.draw(st.sampled_from([0, 1, 7, 16, 33, 70]), "window")
    layer = Layer.random(rng, groups * per, groups, d, window, rotated)
    sizes = data.draw(st.lists(st.one_of(st.integers(0, 4), st.integers(5, 80)), min_size=1, max_size=8))
    total, most = sum(sizes), max(sizes) + 3
    room = window + most + 8 if window else total + 3
    capacity = -(-room // 16) * 16
    tokens = layer.inputs(rng, total)
    want = expected(layer, *tokens)
    caches = [Cache(library, isa, layer, capacity) for isa in ISAS]
    done = 0
    for size in sizes:
        # Drafts that are taken back: what they wrote must not be seen.
        junk = layer.inputs(rng, data.draw(st.integers(0, 3), "junk"))
        part = [np.concatenate([x[done : done + size], j]) for x, j in zip(tokens, junk, strict=True)]
        outs = [cache.run(done, *part)[:size] for cache in caches]
        assert close(outs[0], want[done : done + size])
        for out in outs[1:]:
            np.testing.assert_array_equal(out, outs[0])
        done += size


@pytest.mark.parametrize("window", [0, 512])
def test_long_contexts_are_cut_into_chunks(library, window):
    """One token after 2,500: three chunks of keys, put together; alone, with others and on one thread."""
    rng = np.random.default_rng(3)
    layer = Layer.random(rng, 16, 2, 32, window, 16)
    tokens = layer.inputs(rng, 2504)
    want = expected(layer, *tokens)
    cache = Cache(library, ISAS[-1], layer, 2512)
    for start in range(0, 2500, 500):
        cache.run(start, *(x[start : start + 500] for x in tokens))
    together = cache.run(2500, *(x[2500:] for x in tokens))
    assert close(together, want[2500:])
    alone = Cache(library, ISAS[-1], layer, 2512, threads=1)
    alone.keys, alone.values = cache.keys, cache.values
    for i in range(4):
        part = [x[2500 + i : 2501 + i] for x in tokens]
        np.testing.assert_array_equal(cache.run(2500 + i, *part)[0], together[i])
        np.testing.assert_array_equal(alone.run(2500 + i, *part)[0], together[i])


def test_the_window_counts_the_token_itself(library):
    """Window 7 against 8: the definition tells them apart, and so must the operator."""
    rng = np.random.default_rng(5)
    layer = Layer.random(rng, 4, 1, 16, 7, 16)
    tokens = layer.inputs(rng, 40)
    got = Cache(library, ISAS[0], layer, 48).run(0, *tokens)
    assert close(got, expected(layer, *tokens))
    wider = Layer(4, 1, 16, 8, layer.frequencies, layer.gammas)
    assert not close(got, expected(wider, *tokens))


def test_positions_are_exact_far_out(library):
    """At position 262,000 the angles are still those of fp32 arithmetic."""
    rng = np.random.default_rng(6)
    layer = Layer.random(rng, 2, 1, 16, 16, 16)
    tokens = layer.inputs(rng, 20)
    cache = Cache(library, ISAS[-1], layer, 64, fill=0.0)
    far = 262_000
    got = cache.run(far, *tokens)
    q, k, v, gate = (x.astype(float) for x in tokens)
    at = np.arange(far, far + 20)
    q = rotate(norm(q.reshape(20, 2, 16), layer.gammas[0]), at, layer.frequencies)[-1]
    k = rotate(norm(k.reshape(20, 1, 16), layer.gammas[1]), at, layer.frequencies)[4:, 0]
    weights = np.exp(q @ k.T / 4)
    out = weights / weights.sum(-1, keepdims=True) @ v[4:]
    want = (out / (1 + np.exp(-gate[-1]))[:, None]).reshape(-1)
    assert close(got[-1], want)


def test_a_cache_of_its_own_is_copied_first(library):
    """Outputs that are not bound to the inputs' memory get the rows of before."""
    rng = np.random.default_rng(7)
    layer = Layer.random(rng, 8, 2, 16, 0, 8)
    tokens = layer.inputs(rng, 30)
    cache = Cache(library, ISAS[-1], layer, 32)
    first = cache.run(0, *(x[:20] for x in tokens))
    fed = [
        *(x[20:] for x in tokens),
        *layer.gammas,
        layer.frequencies,
        cache.keys,
        cache.values,
        np.array([20]),
    ]
    names = [value.name for value in cache.session.get_inputs()]
    second = cache.session.run(["y"], dict(zip(names, fed, strict=True)))[0]
    assert close(np.concatenate([first, second]), expected(layer, *tokens))


def test_a_cache_without_room_is_refused(library):
    rng = np.random.default_rng(8)
    for window, capacity, past, t in ((0, 32, 20, 13), (20, 32, 100, 14)):
        layer = Layer.random(rng, 2, 1, 16, window, 16)
        cache = Cache(library, ISAS[-1], layer, capacity, fill=0.0)
        cache.run(past, *layer.inputs(rng, t - 1))
        with pytest.raises(Exception, match="caches are full"):
            cache.run(past, *layer.inputs(rng, t))
