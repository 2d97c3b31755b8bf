"""Weight errors and bytes against the whole tensors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from step35_trt.checkpoint import Checkpoint
from step35_trt.quantize.report.sizes import group_bytes
from step35_trt.quantize.report.weights import _places, compare_weights

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from step35_trt.quantize.run import Job


@pytest.mark.parametrize("recipe", ["cpu-int4", "fp8", "fp8-official"])
def test_errors_and_bytes(
    small: Checkpoint, converted: Callable[[str], tuple[Job, Path]], recipe: str
) -> None:
    after = Checkpoint.open(converted(recipe)[1])
    ticks: list[str] = []
    stages, share = compare_weights(small, after, ticks.append)
    assert share == 1
    assert ticks == [stage.name for stage in stages]
    matrices = [matrix for stage in stages for matrix in stage.matrices]
    assert sorted(matrix.name for matrix in matrices) == sorted(
        name for name in small.codings if len(small.shape(name)) > 1
    )
    for matrix in matrices:
        original, found = small.read(matrix.name), after.read(matrix.name)
        error = np.linalg.norm(found - original) / np.linalg.norm(original)
        assert matrix.weight_error == pytest.approx(error, rel=1e-5)
    groups = group_bytes(small, after)
    assert sum(group.before for group in groups) == small.nbytes
    assert sum(group.after for group in groups) == after.nbytes
    assert sum(group.parameters for group in groups) == sum(math.prod(small.shape(n)) for n in small.codings)


def test_a_sample_says_about_the_same(
    small: Checkpoint, converted: Callable[[str], tuple[Job, Path]]
) -> None:
    after = Checkpoint.open(converted("cpu-int4")[1])
    whole, _ = compare_weights(small, after, lambda _: None)
    some, share = compare_weights(small, after, lambda _: None, sample=1024)
    assert 0 < share < 0.5
    for a, b in zip(whole, some, strict=True):
        for matrix, sampled in zip(a.matrices, b.matrices, strict=True):
            assert sampled.weight_error == pytest.approx(matrix.weight_error, rel=0.25)


@given(shape=st.lists(st.integers(1, 300), min_size=2, max_size=3).map(tuple), sample=st.integers(1, 100_000))
def test_places_are_apart_and_enough(shape: tuple[int, ...], sample: int) -> None:
    parts = list(_places(shape, sample))
    rows = [row for part in parts for row in range(part.start, part.stop)]
    assert rows == sorted(set(rows))
    assert 0 <= rows[0] <= rows[-1] < shape[0]
    assert len(rows) * math.prod(shape[1:]) >= min(sample, math.prod(shape))
