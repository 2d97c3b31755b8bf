from __future__ import annotations

import pytest

from step35_trt.config import Step35Config
from tests.cpu.test_config import published


@pytest.fixture(scope="session")
def step35() -> Step35Config:
    """Step 3.5 Flash as published (specification 1.1)."""
    return Step35Config.parse(published())
