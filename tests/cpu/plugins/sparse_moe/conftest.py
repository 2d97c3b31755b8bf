import pytest

from step35_trt.kernels.plugin import load
from tests.interpreter import within_bounds  # noqa: F401 - a fixture for all tests here


@pytest.fixture(autouse=True)
def apart(monkeypatch):
    """Buffers do not touch in the workspace, so that what reaches beyond one is nobody's."""
    plan = load("sparse_moe", "plan")
    padded = plan.padded
    monkeypatch.setattr(plan, "padded", lambda shape, dtype: padded(shape, dtype) + plan.ALIGN)
