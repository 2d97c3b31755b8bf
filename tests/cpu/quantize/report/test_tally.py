"""The streamed comparison of two distributions against the plain one."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from step35_trt.evaluate import log_softmax
from step35_trt.quantize.report.tally import Tally


@given(
    rows=st.integers(1, 7),
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    scale=st.sampled_from([0.01, 1.0, 60.0]),
    seed=st.integers(0, 2**31),
)
def test_slices_of_the_vocabulary_add_up(rows: int, widths: list[int], scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.normal(0, scale, (rows, sum(widths))).astype(np.float32) for _ in range(2))
    targets = rng.integers(0, sum(widths), rows)
    tally = Tally.of(torch.from_numpy(targets))
    cut = rows // 2
    first = 0
    for width in widths:
        for part in (slice(0, cut), slice(cut, rows)):
            pair = (torch.from_numpy(x[part, first : first + width]) for x in (a, b))
            tally.add(part, first, *pair)
        first += width
    p, q = log_softmax(a), log_softmax(b)
    np.testing.assert_allclose(tally.kl, (np.exp(p) * (p - q)).sum(-1), rtol=1e-9, atol=1e-9)
    losses = np.stack([-p[np.arange(rows), targets], -q[np.arange(rows), targets]])
    np.testing.assert_allclose(tally.loss, losses, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(tally.top, [a.argmax(-1), b.argmax(-1)])
