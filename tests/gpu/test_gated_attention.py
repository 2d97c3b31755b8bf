"""The attention kernels on a GPU: against the definition, run to run, and whatever shares the batch."""

from __future__ import annotations

import os

import pytest
import torch

from step35_trt.kernels import tactics
from step35_trt.kernels.plugin import load
from tests.kernel_checks import check_attention

if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a CUDA device and compiled kernels", allow_module_level=True)

Geometry = load("gated_attention", "geometry").Geometry
FULL = Geometry(64, 8, 128, 0, 64, 1e-5)
WINDOW = Geometry(96, 8, 128, 512, 128, 1e-5)


@pytest.fixture(scope="module")
def entries():
    major, minor = torch.cuda.get_device_capability()
    return tactics.load("gated_attention", 10 * major + minor).entries


@pytest.mark.parametrize("geometry", [FULL, WINDOW], ids=["full", "window"])
@pytest.mark.parametrize("pages", [torch.bfloat16, torch.float8_e4m3fn], ids=["bf16", "fp8"])
@pytest.mark.parametrize(
    ("lengths", "pasts"),
    [((1,), (0,)), ((1, 4, 0, 3), (5000, 511, 7, 70)), ((300, 1, 5), (0, 33, 900)), ((1500,), (700,))],
)
def test_definition_repetition_and_neighbours(geometry, pages, lengths, pasts, entries):
    check_attention(geometry, lengths, pasts, pages, entries, "cuda")
