"""On a GPU: every workload at the model's widths against its definition, and the bits of repeated runs."""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a CUDA device and compiled kernels", allow_module_level=True)

from step35_trt.dialects.torch_kernels import present_target  # noqa: E402 - after the skip
from step35_trt.kernels import tactics  # noqa: E402
from step35_trt.kernels.checks import check  # noqa: E402
from step35_trt.kernels.workloads import published, workloads  # noqa: E402

DEVICE = torch.device("cuda")


@pytest.mark.parametrize("make", workloads(published(), DEVICE))
def test_workload(make) -> None:  # type: ignore[no-untyped-def]
    workload = make()
    with torch.inference_mode():
        found = check(workload, tactics.load(workload.plugin, present_target(DEVICE).capability).entries)
    assert found.error <= found.tolerance, workload.name
    assert found.repeats, workload.name
    assert found.independent, workload.name
