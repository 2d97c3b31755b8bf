"""On a GPU with Triton and cuda-bindings: compiled kernels against those that Triton compiles as it launches.

Triton compiles anew for whole numbers that are 1 or multiples of 16, so sums may be added in another order.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
pytest.importorskip("cuda.bindings")
if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a CUDA device and compiled kernels", allow_module_level=True)

from step35_trt.dialects.torch_kernels import present_target  # noqa: E402 - after the skip
from step35_trt.kernels import plugin, tactics  # noqa: E402
from step35_trt.kernels.catalogue import deployment  # noqa: E402
from step35_trt.kernels.compile import compile_kernels  # noqa: E402
from step35_trt.kernels.cubins import CubinLauncher, open_cubins  # noqa: E402
from step35_trt.kernels.driver import CudaDriver  # noqa: E402
from step35_trt.kernels.jit import JIT  # noqa: E402
from step35_trt.kernels.workloads import published  # noqa: E402
from tests.cpu.kernels.launched import written  # noqa: E402
from tests.kernel_checks import Layer, attention_call  # noqa: E402

if TYPE_CHECKING:
    from step35_trt.kernels.launching import Launcher

DEVICE = torch.device("cuda", 0)
TARGET, CONFIG = present_target(DEVICE), published().config
FORMATS = ("int4", "fp8_channel", "fp8_block")
N, K, WIDTH = 1280, 4096, 11264
dense, pack, kept = (
    plugin.load(*name) for name in (("dense", "launch"), ("sparse_moe", "pack"), ("sparse_moe", "weights"))
)


@pytest.fixture(scope="module")
def cubins(tmp_path_factory: pytest.TempPathFactory) -> CubinLauncher:
    """All kernels of the published model, and dense algebra of a few shapes."""
    products = [(N, K, kind) for kind in FORMATS]
    variants = deployment(CONFIG, TARGET)
    variants += plugin.load("dense", "variants").variants(products, [(K, 1e-5)], [WIDTH])
    folder = tmp_path_factory.mktemp("cubins")
    files = written(folder, compile_kernels(variants, TARGET))
    stream = lambda: torch.cuda.current_stream(DEVICE).cuda_stream  # noqa: E731
    return open_cubins(folder, files, variants, TARGET, CudaDriver(0), stream, "")


def agree(got: torch.Tensor, want: torch.Tensor) -> None:
    got, want = got.float(), want.float()
    assert not got.isnan().any()
    assert (got - want).abs().max() <= 2**-7 * want.abs().max()


@pytest.mark.parametrize("window", [False, True], ids=["full", "window"])
@pytest.mark.parametrize("pages", [torch.bfloat16, torch.float8_e4m3fn], ids=["bf16", "fp8"])
@pytest.mark.parametrize(("lengths", "pasts"), [((1,), (0,)), ((1, 4, 3), (5000, 511, 70)), ((300,), (700,))])
def test_attention(cubins: CubinLauncher, window: bool, pages, lengths, pasts) -> None:
    layer = CONFIG.layers[1 if window else 0]
    module, launch = plugin.load("gated_attention", "geometry"), plugin.load("gated_attention", "launch")
    geometry = module.Geometry.of(layer, CONFIG.rms_norm_eps, module.QUERIES)
    entries = tactics.load("gated_attention", TARGET.capability).entries
    found = []
    for launcher in (JIT, cubins):
        tokens, shared, cache, batch = attention_call(geometry, lengths, pasts, pages, DEVICE)
        out = launch.gated_attention(*tokens, *shared, cache, batch, geometry, entries, launcher)
        found.append((out, cache.keys, cache.values))
    for want, got in zip(*found, strict=True):
        agree(got, want)


@pytest.mark.parametrize("kind", ["bf16", *FORMATS])
@pytest.mark.parametrize("tokens", [1, 16, 100, 2000])
def test_experts(cubins: CubinLauncher, kind: str, tokens: int) -> None:
    geometry = plugin.load("sparse_moe", "geometry").Geometry(
        CONFIG.moe_num_experts,
        CONFIG.moe_top_k,
        CONFIG.hidden_size,
        CONFIG.moe_intermediate_size,
        CONFIG.moe_router_scaling_factor,
        kind,
    )
    entries = tactics.load("sparse_moe", TARGET.capability).entries
    layer, launch = Layer.of(geometry, entries, DEVICE), plugin.load("sparse_moe", "launch")
    generator = torch.Generator(DEVICE).manual_seed(1)
    x = torch.randn(tokens, geometry.hidden, generator=generator, device=DEVICE).bfloat16()
    logits = torch.randn(tokens, geometry.experts, generator=generator, device=DEVICE)
    bias = torch.zeros(geometry.experts, device=DEVICE)

    def run(launcher: Launcher) -> tuple[torch.Tensor, ...]:
        ids, mix = launch.route_logits(logits, bias, geometry, entries, launcher)
        scores = torch.sigmoid(logits)
        again = launch.route_selection(scores, scores, geometry, entries, launcher)
        out = launch.experts(x, ids, mix, layer.weights, geometry, entries, 7.0, launcher=launcher)
        return ids, mix, *again, out

    (ids, *want), (same, *got) = run(JIT), run(cubins)
    assert torch.equal(ids, same)
    for one, other in zip(got, want, strict=True):
        agree(one, other)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 200])
def test_dense_algebra_and_a_recording(cubins: CubinLauncher, kind: str, tokens: int) -> None:
    """On the stream that a recording captures, and again on other numbers."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    codes, scales = (torch.empty(1, *s, dtype=t, device=DEVICE) for s, t in _stored(kind))
    if kind == "int4":
        codes.random_(-(1 << 15), 1 << 15, generator=generator)
        pairs = torch.rand(*scales.shape, 2, generator=generator, device=DEVICE) * 0.005
        scales.copy_(pairs.half().view(torch.int32)[..., 0])
    else:
        codes.copy_(torch.randn(codes.shape, generator=generator, device=DEVICE) * 0.02)
        scales.uniform_(0.5, 1.5, generator=generator)
    matrix = kept.Matrix(codes, scales)
    x = torch.randn(tokens, K, generator=generator, device=DEVICE).bfloat16()
    wide = torch.randn(2, tokens, WIDTH, generator=generator, device=DEVICE).bfloat16()
    gamma = torch.rand(K, generator=generator, device=DEVICE)

    def step(launcher: Launcher) -> list[torch.Tensor]:
        normed = dense.rms_norm(x, gamma, 1e-5, launcher)
        product = dense.linear(normed, matrix, kind, (N, K), launcher)
        return [normed, product, dense.swiglu(wide[0], wide[1], 7.0, launcher)]

    for got, want in zip(step(cubins), step(JIT), strict=True):
        agree(got, want)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step(cubins)
    x.copy_(torch.randn(tokens, K, generator=generator, device=DEVICE))
    wide.copy_(torch.randn(wide.shape, generator=generator, device=DEVICE))
    graph.replay()
    for got, want in zip(recorded, step(cubins), strict=True):
        assert torch.equal(got, want)


def _stored(kind: str) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return list(zip(pack.shapes(kind, N, K), kept.DTYPES[kind], strict=True))
