"""The attention kernels on a GPU: against the definition, run to run, and whatever shares the batch."""

from __future__ import annotations

import pytest
import torch

from step35_trt.kernels import tactics
from step35_trt.kernels.plugin import load

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

launch, naive = load("gated_attention", "launch"), load("gated_attention", "naive")
geometries, batches = load("gated_attention", "geometry"), load("gated_attention", "batch")
FULL = geometries.Geometry(64, 8, 128, 0, 64, 1e-5)
WINDOW = geometries.Geometry(96, 8, 128, 512, 128, 1e-5)


@pytest.fixture(scope="module")
def entries():
    major, minor = torch.cuda.get_device_capability()
    return tactics.load("gated_attention", 10 * major + minor).entries


def call(geometry, lengths, pasts, pages):
    """Inputs of a call over random pages."""
    g, device = geometry, "cuda"
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
    tokens = (
        packed(g.query_heads * d),
        packed(g.kv_heads * d),
        packed(g.kv_heads * d),
        packed(g.query_heads),
    )
    pairs = torch.arange(g.rotary_dims // 2, device=device)
    shared = (torch.ones(d, device=device), torch.ones(d, device=device), 1e4 ** -(2 * pairs / g.rotary_dims))
    return tokens, shared, cache, batch


@pytest.mark.parametrize("geometry", [FULL, WINDOW], ids=["full", "window"])
@pytest.mark.parametrize("pages", [torch.bfloat16, torch.float8_e4m3fn], ids=["bf16", "fp8"])
@pytest.mark.parametrize(
    ("lengths", "pasts"),
    [((1,), (0,)), ((1, 4, 0, 3), (5000, 511, 7, 70)), ((300, 1, 5), (0, 33, 900)), ((1500,), (700,))],
)
def test_definition_repetition_and_neighbours(geometry, pages, lengths, pasts, entries):
    tokens, shared, cache, batch = call(geometry, lengths, pasts, pages)
    out = launch.gated_attention(*tokens, *shared, cache, batch, geometry, entries)
    again = launch.gated_attention(*tokens, *shared, cache, batch, geometry, entries)
    assert torch.equal(out, again)
    expected = naive.gated_attention(*tokens, *shared, cache, batch, geometry)
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)
    start = 0
    for s, (length, past) in enumerate(zip(lengths, pasts, strict=True)):
        part, start = slice(start, start + length), start + length
        if length:
            own = batches.PagedCache(
                cache.keys, cache.values, cache.table[s : s + 1], cache.key_scale, cache.value_scale
            )
            single = batches.Batch.of((length,), (past,), "cuda")
            inputs = [x[part] for x in tokens]
            alone = launch.gated_attention(*inputs, *shared, own, single, geometry, entries)
            assert torch.equal(out[part], alone)
