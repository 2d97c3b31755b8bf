from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from step35_trt.quantize.recipe import Recipe

if TYPE_CHECKING:
    from numpy.typing import NDArray


@pytest.fixture(scope="session")
def int4() -> Recipe:
    return Recipe.load("int4-awq")


@pytest.fixture(scope="session")
def token_ids() -> NDArray[np.int64]:
    """Four sequences of 24 tokens: three windows of the small geometry."""
    return np.random.default_rng(7).integers(0, 97, (4, 24))
