"""Experts of which only the chosen ones are numbers, and how far fp32 and one rounding may be off."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from step35_trt.kernels.plugin import load
from step35_trt.kernels.tactics import Tactic

launch = load("sparse_moe", "launch")
naive = load("sparse_moe", "naive")
pack = load("sparse_moe", "pack")
Geometry = load("sparse_moe", "geometry").Geometry
ExpertWeights, Matrix = (getattr(load("sparse_moe", "weights"), name) for name in ("ExpertWeights", "Matrix"))

FORMATS = ("bf16", "fp8_channel", "fp8_block", "int4")
E4M3 = torch.float8_e4m3fn


def tiling(path: str, rows: int = 64, block: int = 64, splits: int = 2, tokens: int = 4) -> list[Tactic]:
    """Tactics of one path for any number of tokens; int4 takes its own block."""
    product = {"ROWS": rows, "BLOCK_K": block}
    constants: dict[str, dict] = {"route_logits": {}, "route_selection": {}}
    if path == "few":
        constants |= {"few_gate_up": {**product, "SPLITS": splits}, "few_down": product}
    else:
        constants |= {name: {**product, "TOKENS": tokens} for name in ("grouped_gate_up", "grouped_down")}
        constants |= {name: {"BLOCK": 32} for name in ("count_pairs", "place_pairs", "combine")}
    return [Tactic(kernel=name, constants=c, num_warps=4, num_stages=2) for name, c in constants.items()]


def matrix(rng, kind: str, stack: int, used: list[int], n: int, k: int, size: float) -> Matrix:
    """Random experts `used`; the others are NaN wherever the format can say so."""
    values_shape, scale_shape = pack.shapes(kind, n, k)
    if kind == "int4":
        words = torch.full((stack, *values_shape), -1, dtype=torch.int16)
        scales = torch.full((stack, *scale_shape), -1, dtype=torch.int32)  # two fp16 NaN
        for e in used:
            codes = rng.integers(0, 16, (n, k), dtype=np.uint8)
            steps = np.clip(rng.uniform(-1, 1, (n, k // 128)) * size / 4, -65504, 65504)
            words[e], scales[e] = (torch.from_numpy(a) for a in pack.pack_int4(codes, steps))
        return Matrix(words, scales)
    values = torch.full((stack, *values_shape), torch.nan, dtype=torch.bfloat16 if kind == "bf16" else E4M3)
    scales = torch.full((stack, *scale_shape), torch.nan) if scale_shape else None
    for e in used:
        numbers = torch.from_numpy(rng.standard_normal((n, k)).astype(np.float32))
        if scales is None:
            values[e] = (numbers * size).to(values.dtype)
        else:
            values[e] = (numbers * 10.0 ** rng.uniform(-3, 2)).clamp(-448, 448).to(E4M3)  # subnormals too
            scales[e] = torch.from_numpy(rng.uniform(0, 0.1, scale_shape).astype(np.float32)) * size
    return Matrix(values, scales)


@dataclass(repr=False)
class Case:
    """One call of `experts`, and the definition's answer to it."""

    geometry: Geometry
    weights: ExpertWeights
    x: torch.Tensor
    ids: torch.Tensor
    mix: torch.Tensor
    limit: float
    shared_limit: float

    def __repr__(self):
        return f"{self.geometry}, {len(self.x)} tokens, limits {self.limit} {self.shared_limit}"

    @classmethod
    def of(cls, seed, geometry, tokens, limit=0.0, shared_limit=0.0, size=0.1, alike=False):
        rng = np.random.default_rng(seed)
        g = geometry
        selection = torch.from_numpy(rng.standard_normal((tokens, g.experts)).astype(np.float32))
        if alike:
            selection[:] = selection[:1].clone()
        ids, mix = naive.route_selection(selection, selection.sigmoid(), g)
        used = sorted(set(ids.flatten().tolist()))
        shapes = ((g.inner, g.hidden), (g.inner, g.hidden), (g.hidden, g.inner))
        weights = ExpertWeights(*(matrix(rng, g.format, g.stack, used, n, k, size) for n, k in shapes))
        x = torch.from_numpy(rng.standard_normal((tokens, g.hidden)).astype(np.float32)).bfloat16()
        return cls(g, weights, x, ids, mix, limit, shared_limit)

    def run(self, entries, rows=slice(None), **options):
        """The kernels' fp32 output of `rows`; output and workspace hold NaN before."""
        x, ids, mix = (part[rows].contiguous() for part in (self.x, self.ids, self.mix))
        out = torch.full(x.shape, torch.nan)
        as_for = options.get("as_for")
        size = launch.workspace_bytes(self.geometry, entries, len(x), as_for)
        space = torch.full((size,), 255, dtype=torch.uint8)
        limits = self.limit, self.shared_limit
        launch.experts(
            x, ids, mix, self.weights, self.geometry, entries, *limits, out=out, workspace=space, **options
        )
        return out

    def defined(self):
        """The definition's output."""
        limits = self.limit, self.shared_limit
        return naive.experts(self.x, self.ids, self.mix, self.weights, self.geometry, *limits)

    def bound(self):
        """What sums in fp32 and the rounding of an expert's activation to bf16 may change."""
        y = torch.zeros(self.x.shape)
        for t, token in enumerate(self.x.float()):
            for e, weight in zip(self.ids[t].tolist(), self.mix[t], strict=True):
                gate, up, down = (
                    m.expert(self.geometry.format, e)
                    for m in (self.weights.gate, self.weights.up, self.weights.down)
                )
                limit = (self.shared_limit if e == self.geometry.experts else self.limit) or np.inf
                g, u = gate @ token, up @ token
                a, c = torch.nn.functional.silu(g).clamp(max=limit), u.clamp(-limit, limit)
                off_g, off_u = (1e-6 * (m.abs() @ token.abs()) for m in (gate, up))
                # silu's slope is at most 1.1; a clamp cannot make a difference larger
                off = 1.1 * off_g * c.abs() + off_u * a.abs() + (2**-8 + 1e-5) * (a * c).abs()
                y[t] += weight.abs() * (down.abs() @ (off + 1e-6 * (a * c).abs()))
        return 1.01 * y + 1e-6 * self.defined().abs() + 1e-37


@st.composite
def cases(draw, experts):
    """Every format, shapes that no tile divides where the format takes them, one token or several."""
    kind = draw(st.sampled_from(FORMATS), "format")
    count = draw(st.sampled_from(experts), "experts")
    if kind == "int4":
        hidden, inner = 128 * draw(st.integers(1, 2 if count < 100 else 1), "hidden"), 128
    else:
        hidden, inner = (8 * draw(st.integers(2, 20 if count < 100 else 8), name) for name in "hi")
    top_k = min(count, draw(st.sampled_from([1, 2, 3, 9]), "top_k"))
    geometry = Geometry(count, top_k, hidden, inner, 3.0, kind, draw(st.booleans(), "shared"))
    limits = [draw(st.sampled_from([0.0, 0.4, 7.0]), name) for name in ("limit", "shared_limit")]
    size = draw(st.sampled_from([1e-6, 0.1, 1.0, 1e4]), "size")
    tokens = draw(st.integers(1, 3 if top_k < 9 else 1), "tokens")
    alike = draw(st.booleans(), "all tokens to the same experts")
    return Case.of(draw(st.integers(0, 1 << 30), "seed"), geometry, tokens, *limits, size, alike)
