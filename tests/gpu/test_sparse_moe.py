"""At the model's widths on a GPU: `pytest tests/gpu`. Not run where there is none."""

from __future__ import annotations

import os

import pytest
import torch

from step35_trt.kernels import tactics
from step35_trt.kernels.plugin import load

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="needs a CUDA GPU"
)

HIDDEN, INNER, EXPERTS, TOP_K = 4096, 1280, 288, 8
LIMITS = 7.0, 16.0


@pytest.fixture(scope="module", params=["bf16", "fp8_channel", "fp8_block", "int4"])
def layer(request):
    """Random experts of one format, their geometry and the GPU's tactics."""
    pack, kept = load("sparse_moe", "pack"), load("sparse_moe", "weights")
    kind = request.param
    geometry = load("sparse_moe", "geometry").Geometry(EXPERTS, TOP_K, HIDDEN, INNER, 3.0, kind, True)
    generator = torch.Generator("cuda").manual_seed(0)

    def words(*shape):
        return torch.randint(0, 1 << 16, shape, generator=generator, device="cuda", dtype=torch.int32)

    def matrix(n, k):
        value_shape, scale_shape = pack.shapes(kind, n, k)
        values = torch.empty(geometry.stack, *value_shape, dtype=kept.DTYPES[kind][0], device="cuda")
        for one in values:  # expert by expert: a stack's fp32 would not fit
            if kind == "int4":
                one.copy_(words(*value_shape).to(torch.int16))
            else:
                one.copy_(torch.randn(value_shape, generator=generator, device="cuda") * 0.02)
        if not scale_shape:
            return kept.Matrix(values, None)
        shape = (geometry.stack, *scale_shape)
        if kind != "int4":
            return kept.Matrix(values, torch.rand(shape, generator=generator, device="cuda") + 0.5)
        pairs = torch.rand((*shape, 2), generator=generator, device="cuda") * 0.005
        return kept.Matrix(values, pairs.half().view(torch.int32)[..., 0].contiguous())

    widths = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
    weights = kept.ExpertWeights(*(matrix(n, k) for n, k in widths))
    major, minor = torch.cuda.get_device_capability()
    return geometry, weights, tactics.load("sparse_moe", 10 * major + minor).entries


def routed(geometry, entries, tokens, seed=1):
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator, device="cuda").bfloat16()
    logits = torch.randn(tokens, EXPERTS, generator=generator, device="cuda")
    bias = torch.randn(EXPERTS, generator=generator, device="cuda") * 0.05
    return x, *load("sparse_moe", "launch").route_logits(logits, bias, geometry, entries)


@pytest.mark.parametrize("tokens", [1, 2, 8, 16, 17, 64, 300, 1500])
def test_matches_the_definition(layer, tokens):
    geometry, weights, entries = layer
    launch, naive = load("sparse_moe", "launch"), load("sparse_moe", "naive")
    x, ids, mix = routed(geometry, entries, tokens)
    out = torch.full(x.shape, torch.nan, device="cuda")
    launch.experts(x, ids, mix, weights, geometry, entries, *LIMITS, out=out)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    expected = naive.experts(x, ids, mix, weights, geometry, *LIMITS)
    torch.backends.cuda.matmul.allow_tf32 = allowed
    assert (out - expected).norm() / expected.norm() < 4e-3  # activations are rounded to bf16


@pytest.mark.parametrize("tokens", [1, 9, 64, 600])
def test_bits_depend_on_neither_the_run_nor_the_batch(layer, tokens):
    geometry, weights, entries = layer
    launch = load("sparse_moe", "launch")
    x, ids, mix = routed(geometry, entries, tokens)

    def run(rows):
        return launch.experts(
            x[rows], ids[rows], mix[rows], weights, geometry, entries, *LIMITS, as_for=tokens
        )

    whole = run(slice(None))
    for _ in range(20):
        assert torch.equal(run(slice(None)), whole)
    for rows in (slice(0, 1), slice(tokens // 2, tokens)):
        assert torch.equal(run(rows), whole[rows])


@pytest.mark.parametrize("tokens", [1, 64])
def test_a_step_can_be_captured(layer, tokens):
    geometry, weights, entries = layer
    launch = load("sparse_moe", "launch")
    x, ids, mix = routed(geometry, entries, tokens)
    out = torch.empty_like(x)
    size = launch.workspace_bytes(geometry, entries, tokens)
    space = torch.empty(size, dtype=torch.uint8, device="cuda")

    def step():
        launch.experts(x, ids, mix, weights, geometry, entries, *LIMITS, out=out, workspace=space)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    other = routed(geometry, entries, tokens, seed=2)
    for held, new in zip((x, ids, mix), other, strict=True):
        held.copy_(new)
    out.fill_(torch.nan)
    graph.replay()
    expected = launch.experts(*other, weights, geometry, entries, *LIMITS)
    assert torch.equal(out, expected)
