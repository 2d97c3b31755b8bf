"""What must hold of the plugins on any device: at the model's widths on a GPU, small in the interpreter."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from step35_trt.kernels.plugin import load

attention, attention_naive = load("gated_attention", "launch"), load("gated_attention", "naive")
batches = load("gated_attention", "batch")
moe, moe_naive = load("sparse_moe", "launch"), load("sparse_moe", "naive")
pack, kept = load("sparse_moe", "pack"), load("sparse_moe", "weights")


def attention_call(geometry, lengths, pasts, pages, device):
    """Inputs of a call over random pages of the type `pages`: tokens, what they share, cache, batch."""
    g = geometry
    generator = torch.Generator(device).manual_seed(0)
    batch = batches.Batch.of(lengths, pasts, device)
    width = -(-max(past + n for n, past in zip(lengths, pasts, strict=True)) // g.page)
    count = width * len(lengths)
    order = torch.randperm(count, generator=generator, device=device).to(torch.int32)
    shape = (count, g.kv_heads, g.page, g.head_dim)
    keys, values = (torch.randn(shape, generator=generator, device=device).to(pages) for _ in range(2))
    ones = torch.ones(g.kv_heads, device=device)
    cache = batches.PagedCache(keys, values, order.reshape(len(lengths), width), ones, ones)

    def packed(width):
        return torch.randn(batch.tokens, width, generator=generator, device=device).bfloat16()

    d = g.head_dim
    tokens = tuple(packed(heads) for heads in (g.query_heads * d, g.kv_heads * d, g.kv_heads * d))
    pairs = torch.arange(g.rotary_dims // 2, device=device)
    shared = (torch.ones(d, device=device), torch.ones(d, device=device), 1e4 ** -(2 * pairs / g.rotary_dims))
    return (*tokens, packed(g.query_heads)), shared, cache, batch


def check_attention(geometry, lengths, pasts, pages, entries, device):
    """The definition, the same bits again, and the same bits for each sequence alone."""
    tokens, shared, cache, batch = attention_call(geometry, lengths, pasts, pages, device)
    out = attention.gated_attention(*tokens, *shared, cache, batch, geometry, entries)
    again = attention.gated_attention(*tokens, *shared, cache, batch, geometry, entries)
    assert torch.equal(out, again)
    expected = attention_naive.gated_attention(*tokens, *shared, cache, batch, geometry)
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)
    start = 0
    for s, (length, past) in enumerate(zip(lengths, pasts, strict=True)):
        part, start = slice(start, start + length), start + length
        if length:
            own = batches.PagedCache(
                cache.keys, cache.values, cache.table[s : s + 1], cache.key_scale, cache.value_scale
            )
            single = batches.Batch.of((length,), (past,), device)
            inputs = [x[part] for x in tokens]
            alone = attention.gated_attention(*inputs, *shared, own, single, geometry, entries)
            assert torch.equal(out[part], alone)


@dataclass(frozen=True)
class Layer:
    """Random experts and what runs them."""

    geometry: object
    weights: object
    entries: object
    device: str
    limits: tuple[float, float] = (7.0, 16.0)

    @classmethod
    def of(cls, geometry, entries, device):
        """Experts of the geometry's format."""
        generator = torch.Generator(device).manual_seed(0)
        kind = geometry.format

        def words(*shape):
            return torch.randint(0, 1 << 16, shape, generator=generator, device=device, dtype=torch.int32)

        def matrix(n, k):
            value_shape, scale_shape = pack.shapes(kind, n, k)
            values = torch.empty(geometry.stack, *value_shape, dtype=kept.DTYPES[kind][0], device=device)
            for one in values:  # expert by expert: a stack's fp32 would not fit
                if kind == "int4":
                    one.copy_(words(*value_shape).to(torch.int16))
                else:
                    one.copy_(torch.randn(value_shape, generator=generator, device=device) * 0.02)
            if not scale_shape:
                return kept.Matrix(values, None)
            shape = (geometry.stack, *scale_shape)
            if kind != "int4":
                return kept.Matrix(values, torch.rand(shape, generator=generator, device=device) + 0.5)
            pairs = torch.rand((*shape, 2), generator=generator, device=device) * 0.005
            return kept.Matrix(values, pairs.half().view(torch.int32)[..., 0].contiguous())

        inner, hidden = geometry.inner, geometry.hidden
        widths = ((inner, hidden), (inner, hidden), (hidden, inner))
        return cls(geometry, kept.ExpertWeights(*(matrix(n, k) for n, k in widths)), entries, device)

    def routed(self, tokens, seed=1):
        """Tokens with their experts: x, ids, mix."""
        g, device = self.geometry, self.device
        generator = torch.Generator(device).manual_seed(seed)
        x = torch.randn(tokens, g.hidden, generator=generator, device=device).bfloat16()
        logits = torch.randn(tokens, g.experts, generator=generator, device=device)
        bias = torch.randn(g.experts, generator=generator, device=device) * 0.05
        return x, *moe.route_logits(logits, bias, g, self.entries)


def check_experts(layer, tokens):
    """The definition, from an output that held NaN."""
    x, ids, mix = layer.routed(tokens)
    out = torch.full(x.shape, torch.nan, device=layer.device)
    moe.experts(x, ids, mix, layer.weights, layer.geometry, layer.entries, *layer.limits, out=out)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    expected = moe_naive.experts(x, ids, mix, layer.weights, layer.geometry, *layer.limits)
    torch.backends.cuda.matmul.allow_tf32 = allowed
    assert (out - expected).norm() / expected.norm() < 4e-3  # activations are rounded to bf16


def check_bits(layer, tokens, times):
    """The same in `times` runs, and for parts of the batch."""
    x, ids, mix = layer.routed(tokens)

    def run(rows):
        inputs = x[rows], ids[rows], mix[rows]
        return moe.experts(
            *inputs, layer.weights, layer.geometry, layer.entries, *layer.limits, as_for=tokens
        )

    whole = run(slice(None))
    for _ in range(times):
        assert torch.equal(run(slice(None)), whole)
    for rows in (slice(0, 1), slice(tokens // 2, tokens)):
        assert torch.equal(run(rows), whole[rows])


def check_capture(layer, tokens, record):
    """A recorded step runs on what its inputs hold then; `record` gives the replay of a call."""
    x, ids, mix = layer.routed(tokens)
    out = torch.empty_like(x)
    size = moe.workspace_bytes(layer.geometry, layer.entries, tokens)
    space = torch.empty(size, dtype=torch.uint8, device=layer.device)
    fixed = layer.weights, layer.geometry, layer.entries, *layer.limits

    def step():
        moe.experts(x, ids, mix, *fixed, out=out, workspace=space)

    step()
    replay = record(step)
    other = layer.routed(tokens, seed=2)
    for held, new in zip((x, ids, mix), other, strict=True):
        held.copy_(new)
    out.fill_(torch.nan)
    replay()
    assert torch.equal(out, moe.experts(*other, *fixed))
