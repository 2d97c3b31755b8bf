from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from step35_trt.kernels.plugin import load
from tests.cpu.plugins.sparse_moe.cases import Geometry, launch, naive, tiling

sorting = load("sparse_moe", "sorting")
geometry_module = load("sparse_moe", "geometry")
drawn = settings(max_examples=20, deadline=None, derandomize=True)


@st.composite
def geometries(draw):
    experts = draw(st.sampled_from([1, 3, 17, 128, 288, 513]), "experts")
    top_k = draw(st.integers(1, min(experts, 20)), "top_k")
    return Geometry(experts, top_k, 16, 16, draw(st.sampled_from([1.0, 3.0])), "bf16", draw(st.booleans()))


@drawn
@given(g=geometries(), tokens=st.integers(0, 4), ties=st.booleans(), seed=st.integers(0, 1 << 30))
def test_selection_matches_the_definition_and_ties_go_to_the_lowest_id(g, tokens, ties, seed):
    generator = torch.Generator().manual_seed(seed)
    selection = torch.randn(tokens, g.experts, generator=generator)
    if ties:
        selection = selection.round()  # has zeros of both signs
    weights = torch.rand(tokens, g.experts, generator=generator)
    ids, mix = launch.route_selection(selection, weights, g, tiling("few"))
    expected, expected_mix = naive.route_selection(selection, weights, g)
    torch.testing.assert_close(ids, expected, rtol=0, atol=0)
    torch.testing.assert_close(mix, expected_mix, rtol=1e-6, atol=0)


@drawn
@given(g=geometries(), tokens=st.integers(1, 4), seed=st.integers(0, 1 << 30))
def test_logits_match_the_definition(g, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, g.experts, generator=generator, dtype=torch.float32) * 4
    bias = torch.randn(g.experts, generator=generator) * 0.2
    ids, mix = launch.route_logits(logits, bias, g, tiling("few"))
    scores = logits.sigmoid()
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, ids[:, : g.top_k].long(), True)
    assert chosen.sum() == tokens * g.top_k
    assert (ids.diff() > 0).all()
    # A sigmoid may be off in its last bit, so near-ties may go either way.
    least = torch.where(chosen, scores + bias, torch.inf).amin(1)
    assert ((scores + bias)[~chosen] <= least.repeat_interleave((~chosen).sum(1)) + 1e-6).all()
    expected = scores.gather(1, ids[:, : g.top_k].long())
    expected = expected / expected.sum(1, keepdim=True) * g.scale
    torch.testing.assert_close(mix[:, : g.top_k], expected, rtol=3e-6, atol=0)
    if g.shared:
        assert (ids[:, -1] == g.experts).all()
        assert (mix[:, -1] == 1).all()


def test_the_bias_selects_and_does_not_weigh():
    g = Geometry(4, 2, 16, 16, 3.0, "bf16")
    bias = torch.tensor([0.0, 9.0, 0.0, 9.0])
    ids, mix = launch.route_logits(torch.tensor([[5.0, -1.0, 4.0, 1.0]]), bias, g, tiling("few"))
    assert ids.tolist() == [[1, 3]]
    p = torch.tensor([-1.0, 1.0]).sigmoid()
    torch.testing.assert_close(mix[0], 3 * p / p.sum())


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_ids_are_different_and_in_range_whatever_the_scores(value):
    g = Geometry(17, 5, 16, 16, 3.0, "bf16")
    for count in (1, 15, 17):
        logits = torch.zeros(1, 17)
        logits[0, :count] = value
        ids, _ = launch.route_logits(logits, torch.zeros(17), g, tiling("few"))
        assert ids.min() >= 0
        assert ids.max() < 17
        assert (ids.diff() > 0).all()


def test_scores_of_the_wrong_form_are_refused():
    g = Geometry(17, 5, 16, 16, 3.0, "bf16")
    with pytest.raises(ValueError, match="logits or selection is"):
        launch.route_logits(torch.zeros(2, 16), torch.zeros(17), g, tiling("few"))
    with pytest.raises(ValueError, match="bias is"):
        launch.route_logits(torch.zeros(2, 17), torch.zeros(17).double(), g, tiling("few"))


@drawn
@given(
    experts=st.sampled_from([1, 3, 17]),
    tokens=st.integers(1, 30),
    tile=st.sampled_from([1, 4, 16]),
    seed=st.integers(0, 1 << 30),
)
def test_pairs_are_sorted_by_expert_then_token(experts, tokens, tile, seed):
    generator = torch.Generator().manual_seed(seed)
    g = Geometry(experts, min(experts, 3), 16, 16, 1.0, "bf16")
    scores = torch.rand(tokens, experts, generator=generator)
    ids = naive.route_selection(scores, scores, g)[0].flatten()
    most, lanes = geometry_module.most_tiles(g, tokens, tile), 1 << (experts - 1).bit_length()
    counts, order = torch.full((experts,), -1, dtype=torch.int32), torch.full_like(ids, -1)
    tiles = torch.full((1 + 3 * most,), -1, dtype=torch.int32)
    sorting.count_pairs[(experts,)](ids, counts, len(ids), BLOCK=32)
    sorting.place_pairs[(experts,)](
        ids, counts, order, tiles, len(ids), most, ALL=experts, LANES=lanes, TOKENS=tile, BLOCK=32
    )
    assert order.tolist() == ids.sort(stable=True).indices.tolist()
    assert counts.tolist() == torch.bincount(ids, minlength=experts).tolist()
    used = int(tiles[0])
    assert used <= most
    expert, first, last = tiles[1:].view(3, most)[:, :used].tolist()
    places = [(e, p) for e, a, b in zip(expert, first, last, strict=True) for p in range(a, b)]
    assert places == [(int(ids[pair]), place) for place, pair in enumerate(order.tolist())]
    assert all(0 < b - a <= tile for a, b in zip(first, last, strict=True))
