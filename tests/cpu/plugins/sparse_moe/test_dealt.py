"""Experts of which each device holds some: every device computes its own, and the sum is the whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from step35_trt.dialects.torch_experts import Experts
from step35_trt.dialects.torch_kernels import TritonKernels
from step35_trt.kernels.targets import TARGETS
from tests.cpu.plugins.sparse_moe.cases import (
    FORMATS,
    Case,
    ExpertWeights,
    Geometry,
    Matrix,
    launch,
    naive,
    tiling,
)

drawn = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


def share(case: Case, ranks: int, rank: int) -> Case:
    """What one of `ranks` devices has of a case; its ids and weights are the whole case's."""
    here = case.geometry.experts // ranks
    held = slice(rank * here, (rank + 1) * here)

    def cut(matrix: Matrix) -> Matrix:
        scales = None if matrix.scales is None else matrix.scales[held].contiguous()
        return Matrix(matrix.values[held].contiguous(), scales)

    weights = ExpertWeights(*map(cut, (case.weights.gate, case.weights.up, case.weights.down)))
    first = rank * here
    ids = torch.where((case.ids >= first) & (case.ids < first + here), case.ids - first, -1).int()
    return replace(case, geometry=replace(case.geometry, held=here), weights=weights, ids=ids)


@st.composite
def dealt(draw):
    """A case, and among how many devices its experts are dealt out."""
    kind = draw(st.sampled_from(FORMATS), "format")
    ranks = draw(st.sampled_from([2, 3, 4]), "ranks")
    count = ranks * draw(st.sampled_from([1, 2, 5]), "experts of each")
    hidden, inner = (128, 128) if kind == "int4" else (72, 56)
    top_k = min(count, draw(st.sampled_from([1, 2, 3, 9]), "top_k"))
    geometry = Geometry(count, top_k, hidden, inner, 3.0, kind)
    tokens = draw(st.integers(1, 4 if top_k < 9 else 2), "tokens")
    limit = draw(st.sampled_from([0.0, 0.4]), "limit")
    return Case.of(draw(st.integers(0, 1 << 30), "seed"), geometry, tokens, limit, size=0.3), ranks


@drawn
@given(drawn_case=dealt(), path=st.sampled_from(["few", "grouped"]))
def test_the_devices_sum_is_the_whole(drawn_case, path):
    """Each one's part is the definition's too, and NaN where a device looks at what is not its own."""
    case, ranks = drawn_case
    entries = tiling(path, 128, 128, tokens=4)
    parts = [share(case, ranks, rank) for rank in range(ranks)]
    total = torch.zeros(case.x.shape)
    for part in parts:
        found = part.run(entries)
        assert ((found - part.defined()).abs() <= case.bound()).all()
        total += found
    assert ((total - case.defined()).abs() <= case.bound()).all()


@drawn
@given(
    experts=st.sampled_from([2, 6, 288]),
    ranks=st.sampled_from([2, 3]),
    tokens=st.integers(0, 4),
    seed=st.integers(0, 1 << 30),
)
def test_all_choose_among_all_experts(experts, ranks, tokens, seed):
    here, generator = max(1, experts // ranks), torch.Generator().manual_seed(seed)
    whole = Geometry(experts, min(experts, 5), 16, 16, 3.0, "bf16")
    part = replace(whole, held=here)
    selection, weights = (torch.rand(tokens, experts, generator=generator) for _ in range(2))
    bias = torch.rand(experts, generator=generator)
    for name, other in (("route_selection", weights), ("route_logits", bias)):
        ids, mix = getattr(launch, name)(selection, other, whole, tiling("few"))
        for first in range(0, experts - here + 1, here):
            local, same = getattr(launch, name)(selection, other, part, tiling("few"), first=first)
            held = (ids >= first) & (ids < first + here)
            assert torch.equal(local, torch.where(held, ids - first, -1).int())
            assert torch.equal(same, mix)
            defined, _ = getattr(naive, name)(selection, other, part, first)
            assert torch.equal(local, defined)


@pytest.mark.parametrize("tokens", [2, 20])
def test_the_vocabulary_s_word_on_each_device(tokens):
    """From selection to the sum, with the tactics of a GPU: few tokens, and more."""
    case = Case.of(2, Geometry(4, 2, 128, 128, 3.0, "int4"), 20, 0.4, size=0.3)
    generator = torch.Generator().manual_seed(0)
    selection, weights = (torch.rand(tokens, 4, generator=generator) for _ in range(2))
    call = case.x[:tokens].float(), selection, weights, "moe", 2, 3.0, 0.4

    def said(part: Case, first: int) -> torch.Tensor:
        class Source:
            def experts(self, prefix):
                return Experts("int4", part.weights, first)

        return TritonKernels(Source(), TARGETS["sm_90"]).sparse_moe(*call)

    total = sum(said(share(case, 2, rank), 2 * rank) for rank in range(2))
    torch.testing.assert_close(total, said(case, 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", ["few", "grouped"])
def test_a_device_that_has_none_of_a_token_s_experts_adds_nothing(path):
    case = Case.of(1, Geometry(4, 2, 64, 48, 3.0, "bf16"), 3, size=0.3)
    part = share(case, 2, 0)
    part.ids[:] = -1
    assert torch.equal(part.run(tiling(path)), torch.zeros(3, 64))


def test_what_cannot_be_dealt_out_is_refused():
    for held, shared in ((2, True), (0, False), (5, False)):
        with pytest.raises(ValueError, match="of 4 experts"):
            Geometry(4, 2, 64, 64, 3.0, "bf16", shared, held)
    part = Geometry(4, 2, 64, 64, 3.0, "bf16", held=2)
    scores = torch.zeros(1, 4)
    for first in (-1, 3):
        with pytest.raises(ValueError, match=f"2 experts from {first} on, of 4"):
            launch.route_selection(scores, scores, part, tiling("few"), first=first)
