from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cpu.plugins.gated_attention.cases import Batch, cases, layer, make, tiling, tilings


@pytest.fixture(autouse=True)
def poisoned_memory():
    """What is allocated holds NaN, so that what a kernel leaves out is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_fp32_is_the_dialects(data):
    case = data.draw(cases())
    out, _ = case.run(data.draw(tilings(case.spec)))
    torch.testing.assert_close(out, case.oracle(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("pages", [torch.bfloat16, torch.float8_e4m3fn])
@settings(max_examples=4, deadline=None)
@given(st.data())
def test_narrow_pages_hold_and_give_what_is_defined(pages, data):
    case = data.draw(cases(pages=pages, activations=torch.bfloat16))
    out, cache = case.run(data.draw(tilings(case.spec)))
    expected, defined = case.defined()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)
    step = 0.13 if pages == torch.float8_e4m3fn else 0.008
    for kept, meant in ((cache.keys.float(), defined.keys.float()), (cache.values, defined.values)):
        # A sum in another order may fall on the other side of a rounding: one step, seldom.
        torch.testing.assert_close(kept.float(), meant.float(), atol=1e-2, rtol=step, equal_nan=True)
        written = ~meant.isnan()
        assert (kept.float() != meant.float())[written].sum() <= 0.02 * written.sum()


@settings(max_examples=3, deadline=None)
@given(st.data())
def test_bits_do_not_depend_on_the_batch(data):
    case = data.draw(cases())
    entries = data.draw(tilings(case.spec))
    out, _ = case.run(entries)
    again, _ = case.run(entries)
    assert torch.equal(out, again)
    for s, length in enumerate(case.batch.lengths):
        part, single = case.alone(s)
        if length:
            assert torch.equal(out[part], single.run(entries)[0])


@pytest.mark.parametrize(("new", "past"), [(1, 600), (6, 700)])
def test_the_window_is_512_keys_with_the_querys_own(new, past):
    case = make(layer(1, 1, 16, 512, 16), (new,), (past,), page=64)
    width = case.cache.table.shape[1]
    case.cache.values.nan_to_num_(0).zero_()
    case.v.zero_()
    case.cache.keys.zero_()
    # The first query sees distance 511 and not 512; equal weights, so the sum counts what is seen.
    for position, value in ((past - 511, 1.0), (past - 512, 1000.0)):
        entry = case.cache.table[0, (position // 64) % width]
        case.cache.values[entry, :, position % 64] = value
    out, _ = case.run(tiling(block=64, splits=4, least=64))
    total = out[0, 0].item() / torch.sigmoid(case.gate[0, 0]).item()
    assert 1e-5 < total < 0.1


@settings(max_examples=4, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=3, max_size=5),
    st.integers(8, 30),  # with the first call's 4 tokens: a whole ring
    st.booleans(),
)
def test_rejected_drafts_leave_nothing_behind(steps, past, window):
    """A ring with exactly the rows it needs, in pages of 4, against histories that never saw the drafts."""
    spec = layer(4, 1, 16, 9 if window else 0, 8)
    entries, position = tiling(block=4, splits=2, least=8, tokens=2), past
    total = past + sum(drafts for drafts, _ in steps)
    first = make(spec, (4,), (past,), page=4)
    if not window:
        first = make(spec, (total + 4 - past,), (past,), page=4)
    assert not window or first.cache.table.shape[1] <= -(-first.geometry.ring_rows // 4)
    cache, (keys, values) = first.copied(), first.history[0]
    for i, (drafts, rejected) in enumerate(steps):
        step = make(spec, (drafts,), (position,), page=4, seed=i + 1)
        step.cache, step.history = cache, [(keys[:position], values[:position])]
        step.q_gamma, step.k_gamma = first.q_gamma, first.k_gamma
        out, _ = step.run(entries, cache)
        torch.testing.assert_close(out, step.oracle(), atol=2e-5, rtol=1e-4)
        kept = max(drafts - rejected, 0)
        _, whole = step.defined()
        position, (keys, values) = _advance(step, whole, position, kept)


def _advance(step, cache, position, kept):
    """Histories with the accepted rows, taken from the definition's pages."""
    keys, values = step.history[0]
    page, width = step.geometry.page, cache.table.shape[1]
    for p in range(position, position + kept):
        entry = cache.table[0, (p // page) % width]
        keys = torch.cat([keys, cache.keys[entry, :, p % page][None]])
        values = torch.cat([values, cache.values[entry, :, p % page][None]])
    return position + kept, (keys, values)


@pytest.mark.parametrize("window", [0, 8])
def test_a_table_that_would_be_overrun_is_refused(window):
    case = make(layer(4, 1, 16, window, 8), (4,), (30,), page=4)
    narrow = case.copied()
    narrow = type(narrow)(
        narrow.keys, narrow.values, narrow.table[:, 1:].contiguous(), narrow.key_scale, narrow.value_scale
    )
    with pytest.raises(ValueError, match="rows"):
        case.run(tiling(), narrow)


def test_shapes_and_types_are_checked():
    case = make(layer(), (2,), (3,))
    case.gate = case.gate[:1]
    with pytest.raises(ValueError, match="gate"):
        case.run(tiling())
    with pytest.raises(ValueError, match="batch"):
        Batch.of((1, -1), (0, 0))


def test_nothing_to_do():
    case = make(layer(), (0, 0), (3, 0))
    assert case.run(tiling())[0].shape == (0, 128)
