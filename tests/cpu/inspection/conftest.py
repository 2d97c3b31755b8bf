from __future__ import annotations

import pytest

from step35_trt.config import Step35Config
from step35_trt.lower import ModelPrograms
from step35_trt.program import SteppedProgram, TokenRange
from step35_trt.resources import PUBLISHED
from tests.forms import forms


@pytest.fixture(scope="session")
def program() -> SteppedProgram:
    """The published model's, in int4."""
    config = Step35Config.load(PUBLISHED)
    made = ModelPrograms.of(config, forms(config, "int4-awq"))
    ranges = (TokenRange(least=1, mostly=3, most=3),)
    return SteppedProgram(
        decoder=made.decoder, mtp=made.mtp, ranges=ranges, segments={}, kernels=(), weights={}, experts={}
    )
