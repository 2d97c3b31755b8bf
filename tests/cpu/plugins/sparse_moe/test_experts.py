from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from step35_trt.dialects.torch import SequenceBatch, TorchOps
from step35_trt.errors import UnsupportedError
from tests.cpu.plugins.sparse_moe.cases import FORMATS, Case, Geometry, cases, launch, naive, tiling

drawn = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
PATHS = ("few", "grouped")


def holds(case, entries):
    return ((case.run(entries) - case.defined()).abs() <= case.bound()).all()


@drawn
@given(
    case=cases([3, 17, 128, 288, 513]), block=st.sampled_from([32, 128]), splits=st.sampled_from([1, 2, 4])
)
def test_few_tokens_match_the_definition(case, block, splits):
    assert holds(case, tiling("few", 128, 128 if case.geometry.format == "int4" else block, splits))


@settings(drawn, max_examples=9)
@given(case=cases([3, 17]), block=st.sampled_from([32, 128]), tokens=st.sampled_from([1, 2, 16]))
def test_grouped_tokens_match_the_definition(case, block, tokens):
    block = 128 if case.geometry.format == "int4" else block
    assert holds(case, tiling("grouped", 128, block, tokens=tokens))


@pytest.mark.parametrize(("experts", "kind"), [(128, "int4"), (288, "int4"), (513, "fp8_block")])
def test_grouped_tokens_of_many_experts(experts, kind):
    case = Case.of(1, Geometry(experts, 2, 128, 128, 3.0, kind), 2, 0.4, size=0.3)
    assert holds(case, tiling("grouped", 128, 128, tokens=16))


@pytest.mark.parametrize("kind", FORMATS)
def test_more_tokens_than_a_tile_and_narrow_tiles(kind):
    case = Case.of(1, Geometry(3, 1, 128, 128, 3.0, kind), 20, 0.4, size=0.3)
    assert holds(case, tiling("grouped", 64, 128, tokens=16))


@pytest.mark.parametrize("kind", FORMATS)
def test_the_bound_is_tight_and_both_limits_are_reached(kind):
    case = Case.of(2, Geometry(5, 2, 128, 128, 3.0, kind), 4, limit=0.4, size=0.3)
    assert case.bound().max() < 0.03 * case.defined().abs().max()
    loose = Case.of(2, case.geometry, 4, limit=0.0, size=0.3)
    assert (loose.defined() - case.defined()).abs().max() > 10 * case.bound().max()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["bf16", "int4"])
def test_a_token_has_the_same_bits_in_every_batch(path, kind):
    case = Case.of(3, Geometry(4, 2, 128, 128, 3.0, kind, True), 5, 7.0, 16.0)
    entries = tiling(path, 128, 128, tokens=4)
    whole = case.run(entries)
    for rows in (slice(0, 1), slice(2, 5)):
        torch.testing.assert_close(case.run(entries, rows), whole[rows], rtol=0, atol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shared", [False, True])
def test_what_is_not_finite_stays_in_its_row(path, shared):
    case = Case.of(4, Geometry(3, 3, 64, 48, 3.0, "bf16", shared), 4, 7.0, 16.0)
    clean = case.run(tiling(path))
    case.x[0, 3] = torch.nan
    case.x[2, 5] = torch.inf
    out = case.run(tiling(path))
    assert out[[0, 2]].isnan().all()
    torch.testing.assert_close(out[[1, 3]], clean[[1, 3]], rtol=0, atol=0)


def test_both_paths_by_the_number_of_tokens_and_pinned():
    case = Case.of(5, Geometry(4, 2, 64, 64, 3.0, "bf16"), 5)
    few = [
        entry.model_copy(update={"when": {"tokens": (0, 2)}}) if entry.kernel.startswith("few") else entry
        for entry in tiling("few")
    ]
    both = few + tiling("grouped")
    for tokens, path in ((2, "few"), (3, "grouped")):
        rows = slice(0, tokens)
        expected = case.run(tiling(path), rows)
        torch.testing.assert_close(case.run(both, rows), expected, rtol=0, atol=0)
        other = case.run(tiling("few"), rows)
        torch.testing.assert_close(case.run(both, rows, as_for=1), other, rtol=0, atol=0)


def test_no_tokens():
    case = Case.of(6, Geometry(4, 2, 64, 64, 3.0, "bf16"), 3)
    for path in PATHS:
        assert case.run(tiling(path), slice(0, 0)).shape == (0, 64)


def test_output_is_bf16_unless_asked_otherwise():
    case = Case.of(7, Geometry(4, 2, 64, 64, 3.0, "bf16"), 2)
    out = launch.experts(case.x, case.ids, case.mix, case.weights, case.geometry, tiling("few"))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, case.run(tiling("few")).bfloat16(), rtol=0, atol=0)


def test_the_definition_is_the_vocabularys():
    case = Case.of(8, Geometry(6, 3, 64, 48, 3.0, "bf16"), 7, limit=0.4, size=0.3)

    class Experts:
        def expert(self, name, index):
            part = name.split(".")[1].removesuffix("_proj")
            return getattr(case.weights, part).expert("bf16", index)

    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(7, 6, generator=generator)
    selection = torch.rand(7, 6, generator=generator)
    ids, mix = naive.route_selection(selection, weights, case.geometry)
    used = set(case.ids.flatten().tolist())
    assert used == set(range(6))  # all are numbers
    found = naive.experts(case.x, ids, mix, case.weights, case.geometry, case.limit)
    ops = TorchOps(Experts(), SequenceBatch.fresh(7))
    expected = ops.sparse_moe(case.x.float(), selection, weights, "moe", 3, 3.0, case.limit)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused():
    case = Case.of(9, Geometry(4, 2, 64, 64, 3.0, "fp8_block"), 2)
    x, ids, mix, weights, g, entries = case.x, case.ids, case.mix, case.weights, case.geometry, tiling("few")
    with pytest.raises(ValueError, match=r"x is .* where contiguous"):
        launch.experts(x.float(), ids, mix, weights, g, entries)
    with pytest.raises(ValueError, match=r"ids is .* where contiguous"):
        launch.experts(x, ids[:, :1], mix, weights, g, entries)
    with pytest.raises(ValueError, match=r"gate\.values is .* where contiguous"):
        launch.experts(x, ids, mix, weights, Geometry(5, 2, 64, 64, 3.0, "fp8_block"), entries)
    bf16 = type(weights)(*(type(m)(m.values.bfloat16(), m.scales) for m in vars(weights).values()))
    with pytest.raises(ValueError, match=r"gate\.scales: bf16 takes no scales"):
        launch.experts(x, ids, mix, bf16, Geometry(4, 2, 64, 64, 3.0, "bf16"), entries)
    with pytest.raises(ValueError, match="workspace has to be"):
        launch.experts(x, ids, mix, weights, g, entries, workspace=torch.empty(3, dtype=torch.uint8))
    with pytest.raises(UnsupportedError, match="multiple of 128"):
        launch.experts(x, ids, mix, weights, Geometry(4, 2, 64, 64, 3.0, "int4"), entries)
    with pytest.raises(UnsupportedError, match="no tactic of"):
        launch.experts(x, ids, mix, weights, g, [])
    with pytest.raises(ValueError, match="top 5 of 4"):
        Geometry(4, 5, 64, 64, 3.0, "bf16")
