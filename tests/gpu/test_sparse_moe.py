"""The experts' kernels on a GPU, at the model's widths."""

from __future__ import annotations

import os

import pytest
import torch

from step35_trt.kernels import tactics
from step35_trt.kernels.plugin import load
from tests.kernel_checks import Layer, check_bits, check_capture, check_experts

if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a CUDA device and compiled kernels", allow_module_level=True)

HIDDEN, INNER, EXPERTS, TOP_K = 4096, 1280, 288, 8


@pytest.fixture(scope="module", params=["bf16", "fp8_channel", "fp8_block", "int4"])
def layer(request):
    """Random experts of one format, a shared one among them, and the GPU's tactics."""
    geometry = load("sparse_moe", "geometry").Geometry(
        EXPERTS, TOP_K, HIDDEN, INNER, 3.0, request.param, True
    )
    major, minor = torch.cuda.get_device_capability()
    return Layer.of(geometry, tactics.load("sparse_moe", 10 * major + minor).entries, "cuda")


@pytest.mark.parametrize("tokens", [1, 2, 8, 16, 17, 64, 300, 1500])
def test_matches_the_definition(layer, tokens):
    check_experts(layer, tokens)


@pytest.mark.parametrize("tokens", [1, 9, 64, 600])
def test_bits_depend_on_neither_the_run_nor_the_batch(layer, tokens):
    check_bits(layer, tokens, 20)


@pytest.mark.parametrize("tokens", [1, 64])
def test_a_step_can_be_captured(layer, tokens):
    def record(step):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    check_capture(layer, tokens, record)
