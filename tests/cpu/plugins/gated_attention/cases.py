"""Batches over pages that hold what a query may see, and NaN everywhere else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from step35_trt.config import LayerSpec
from step35_trt.dialects.torch import LayerCache, SequenceBatch, TorchOps
from step35_trt.kernels.plugin import load
from step35_trt.kernels.tactics import Tactic
from step35_trt.rotary import inverse_frequencies

EPS = 1e-5
launch = load("gated_attention", "launch")
naive = load("gated_attention", "naive")
Geometry = load("gated_attention", "geometry").Geometry
Batch, PagedCache = (getattr(load("gated_attention", "batch"), name) for name in ("Batch", "PagedCache"))


def layer(heads=8, groups=2, dim=16, window=0, rotary=8) -> LayerSpec:
    kind = "sliding_attention" if window else "full_attention"
    return LayerSpec(0, kind, heads, groups, dim, window, 1e4, rotary, None, False, 0.0, 0.0)


def tiling(block=8, splits=4, least=8, tokens=4, heads=1) -> list[Tactic]:
    """Tactics for any geometry; a test names the tile's sizes it is about."""
    reduce = {"AT_ONCE": 2}
    prefill = {"TOKENS": tokens, "HEADS": heads, "BLOCK_N": block}
    decode = {"BLOCK_N": block, "SPLITS": splits, "LEAST": least, "LEAST_ROWS": 4}
    constants = {"prepare": {}, "decode": decode, "reduce": reduce, "prefill": prefill}
    return [
        Tactic(kernel=name, constants=given, num_warps=4, num_stages=2) for name, given in constants.items()
    ]


@dataclass(repr=False)
class Case:
    """Inputs of one call, beside what came before: `history[s]` `[past, G, d]` keys and values."""

    spec: LayerSpec
    geometry: Geometry
    batch: Batch
    cache: PagedCache
    history: list[tuple[torch.Tensor, torch.Tensor]]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gate: torch.Tensor
    q_gamma: torch.Tensor
    k_gamma: torch.Tensor
    frequencies: torch.Tensor

    def __repr__(self):
        return f"{self.geometry}, {self.batch.lengths} after {self.batch.pasts}"

    @property
    def packed(self):
        return self.q, self.k, self.v, self.gate

    @property
    def shared(self):
        return self.q_gamma, self.k_gamma, self.frequencies

    def copied(self):
        cache = self.cache
        return PagedCache(
            cache.keys.clone(), cache.values.clone(), cache.table, cache.key_scale, cache.value_scale
        )

    def run(self, entries, cache=None):
        """The kernels' result and the pages after it."""
        cache = cache or self.copied()
        out = launch.gated_attention(*self.packed, *self.shared, cache, self.batch, self.geometry, entries)
        return out, cache

    def defined(self):
        """The definition's result over the same pages, and the pages after it."""
        cache = self.copied()
        return naive.gated_attention(*self.packed, *self.shared, cache, self.batch, self.geometry), cache

    def oracle(self):
        """The dialect's result over whole histories."""
        caches = tuple({0: LayerCache(keys, values)} if len(keys) else {} for keys, values in self.history)
        ops = TorchOps(None, SequenceBatch(self.batch.lengths, self.batch.pasts, caches))
        return ops.gated_attention(*self.packed, self.q_gamma, self.k_gamma, EPS, self.spec)

    def alone(self, s: int):
        """Sequence `s` without the others, over the same pages; and where its tokens stand."""
        start, length, past = sum(self.batch.lengths[:s]), self.batch.lengths[s], self.batch.pasts[s]
        part, cache = slice(start, start + length), self.copied()
        table = cache.table[s : s + 1].contiguous()
        own = PagedCache(cache.keys, cache.values, table, cache.key_scale, cache.value_scale)
        inputs = [x[part].contiguous() for x in self.packed]
        single = Batch.of((length,), (past,))
        return part, Case(self.spec, self.geometry, single, own, [self.history[s]], *inputs, *self.shared)


def make(
    spec: LayerSpec,
    lengths,
    pasts,
    *,
    page=8,
    queries=4,
    pages=torch.float32,
    activations=torch.float32,
    seed=0,
) -> Case:
    """A case over random histories; its tables are as narrow as may be."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to(dtype)

    geometry = Geometry.of(spec, EPS, queries, page)
    batch = Batch.of(lengths, pasts)
    g, d = spec.kv_heads, spec.head_dim
    rows = [
        min(past + n, spec.window + max(n, 1) - 1) if spec.window else past + n
        for n, past in zip(lengths, pasts, strict=True)
    ]
    width = max(1, -(-max(rows, default=1) // page))
    count = width * len(lengths) + 1
    table = torch.randperm(count, generator=generator)[: width * len(lengths)].view(-1, width)
    narrow = pages == torch.float8_e4m3fn
    scales = 0.01 + torch.rand(2, g, generator=generator) / 50 if narrow else torch.ones(2, g)
    cache = PagedCache(
        torch.full((count, g, page, d), torch.nan).to(pages),
        torch.full((count, g, page, d), torch.nan).to(pages),
        table.to(torch.int32).contiguous(),
        scales[0].contiguous(),
        scales[1].contiguous(),
    )
    history = []
    for s, past in enumerate(pasts):
        keys, values = normal(past, g, d), normal(past, g, d)
        history.append((keys, values))
        for position in range(max(0, past - spec.window + 1) if spec.window else 0, past):
            entry = cache.table[s, (position // page) % width]
            cache.keys[entry, :, position % page] = (keys[position] / scales[0, :, None]).to(pages)
            cache.values[entry, :, position % page] = (values[position] / scales[1, :, None]).to(pages)
    t = batch.tokens
    return Case(
        spec,
        geometry,
        batch,
        cache,
        history,
        normal(t, spec.query_heads * d, dtype=activations),
        normal(t, g * d, dtype=activations),
        normal(t, g * d, dtype=activations),
        normal(t, spec.query_heads, dtype=activations),
        0.5 + torch.rand(d, generator=generator),
        0.5 + torch.rand(d, generator=generator),
        torch.from_numpy(inverse_frequencies(spec)),
    )


# Shares that are powers of two and that are not; rotary dimensions that leave a rest, none, or fit no tile.
LAYERS = (
    layer(8, 1, 16, 0, 8),
    layer(12, 1, 16, 8, 16),
    layer(2, 2, 32, 5, 12),
    layer(3, 1, 16, 0, 12),
    layer(1, 1, 16, 16, 16),
)


@st.composite
def cases(draw, **given):
    """Ragged batches: nothing, one to five tokens, prefill; pasts on both sides of pages and windows."""
    spec = draw(st.sampled_from(LAYERS))
    sequences = draw(st.integers(1, 2))
    length = st.one_of(st.integers(0, 5), st.integers(6, 9))
    lengths = draw(st.lists(length, min_size=sequences, max_size=sequences))
    pasts = draw(st.lists(st.integers(0, 30), min_size=sequences, max_size=sequences))
    return make(
        spec,
        lengths,
        pasts,
        page=draw(st.sampled_from((8, 16))),
        queries=draw(st.sampled_from((1, 4, 5))),
        seed=draw(st.integers(0, 2**16)),
        **given,
    )


@st.composite
def tilings(draw, spec: LayerSpec):
    share = spec.query_heads // spec.kv_heads
    return tiling(
        block=draw(st.sampled_from((4, 8))),
        splits=draw(st.sampled_from((1, 4))),
        least=draw(st.sampled_from((8, 16))),
        tokens=draw(st.sampled_from((2, 4))),
        heads=draw(st.sampled_from([n for n in (1, 2, 4) if share % n == 0])),
    )
