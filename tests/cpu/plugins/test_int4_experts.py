import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cpu.plugins import definition

ISAS = definition.available_isas()
FED = {"x": None, "selection": None, "weights": None}
relaxed = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def operator(library, isa, fixed, block, top_k, scale=3.0, limit=0.0, **options):
    made = definition.session(
        library,
        isa,
        "Int4Experts",
        FED,
        fixed,
        block=block,
        top_k=top_k,
        scale=float(scale),
        limit=float(limit),
        **options,
    )
    return lambda *fed: made.run(None, dict(zip(FED, fed, strict=True)))[0]


def routed(rng, t, experts, d, size=1.0):
    x = (rng.standard_normal((t, d)) * size).astype(np.float32)
    weights = rng.random((t, experts)).astype(np.float32)
    return x, weights + rng.normal(0, 0.3, experts).astype(np.float32), weights


@relaxed
@given(data=st.data(), seed=st.integers(0, 1 << 30))
def test_matches_the_definition_on_every_instruction_set_with_the_same_bits(library, data, seed):
    block = data.draw(st.sampled_from([16, 32, 64, 128]), "block")
    experts = data.draw(st.sampled_from([1, 3, 17, 128, 288]), "experts")
    few = experts < 100
    d = block * data.draw(st.integers(1, 5 if few else 1), "d")
    inner = block * data.draw(st.integers(1, 3 if few else 1), "inner")
    t = data.draw(st.integers(0, 70 if block < 128 else 12), "t")
    top_k = data.draw(st.integers(1, min(8, experts)), "top_k")
    limit = data.draw(st.sampled_from([0.0, 0.5, 7.0]), "limit")
    rng = np.random.default_rng(seed)
    x, selection, weights = routed(rng, t, experts, d, data.draw(st.sampled_from([0.1, 1.0, 30.0]), "size"))
    if data.draw(st.booleans(), "all to the same"):
        selection[:] = selection[:1]
    if data.draw(st.booleans(), "ties"):
        selection = np.round(selection, 1)
    values, fixed = definition.stacked(rng, experts, d, inner, block)
    attributes = {"block": block, "top_k": top_k, "scale": 3.0, "limit": limit}
    outs = [operator(library, isa, fixed, **attributes)(x, selection, weights) for isa in ISAS]
    expected, bound = definition.experts(x, selection, weights, *values, **attributes)
    assert outs[0].shape == (t, d)
    assert (np.abs(outs[0] - expected) <= bound).all()
    for out in outs[1:]:
        np.testing.assert_array_equal(out, outs[0])


@pytest.mark.parametrize("isa", ISAS)
def test_the_bound_is_tight(library, isa):
    """The definition's bound counts codes that may fall either way; few do, so on the whole it is close."""
    rng = np.random.default_rng(4)
    values, fixed = definition.stacked(rng, 8, 256, 128, 64)
    fed = routed(rng, 30, 8, 256)
    attributes = {"block": 64, "top_k": 3, "scale": 3.0, "limit": 7.0}
    out = operator(library, isa, fixed, **attributes)(*fed)
    expected, _ = definition.experts(*fed, *values, **attributes)
    close = np.abs(out - expected) <= 1e-5 * np.abs(expected).max()
    assert close.all(1).mean() > 0.7


@pytest.mark.parametrize("isa", ISAS)
def test_a_token_does_not_depend_on_its_batch_nor_on_threads(library, isa):
    rng = np.random.default_rng(5)
    _, fixed = definition.stacked(rng, 9, 160, 96, 32)
    x, selection, weights = routed(rng, 150, 9, 160)
    selection[:100, 4] = 9  # one expert with more tokens than are done at once
    run = operator(library, isa, fixed, 32, 3, limit=7)
    whole = run(x, selection, weights)
    for size in (1, 2, 5, 8, 9, 30, 64, 70):
        for start in (0, 11, 150 - size):
            part = slice(start, start + size)
            np.testing.assert_array_equal(run(x[part], selection[part], weights[part]), whole[part])
    alone = operator(library, isa, fixed, 32, 3, limit=7, threads=1)
    np.testing.assert_array_equal(alone(x, selection, weights), whole)
    for _ in range(20):
        np.testing.assert_array_equal(run(x, selection, weights), whole)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("t", [1, 40])
def test_experts_that_are_not_chosen_are_not_read(library, isa, t):
    rng = np.random.default_rng(6)
    _, fixed = definition.stacked(rng, 20, 64, 32, 32)
    x, selection, weights = routed(rng, t, 20, 64)
    selection[:, 10:] -= 100
    clean = operator(library, isa, fixed, 32, 4)(x, selection, weights)
    for scales in ("gus", "dns"):
        fixed[scales][10:] = np.nan
    np.testing.assert_array_equal(operator(library, isa, fixed, 32, 4)(x, selection, weights), clean)


def test_ties_go_to_the_first(library):
    rng = np.random.default_rng(7)
    _, fixed = definition.stacked(rng, 6, 32, 32, 32)
    x = rng.standard_normal((1, 32)).astype(np.float32)
    weights = rng.random((1, 6)).astype(np.float32)
    even = operator(library, ISAS[-1], fixed, 32, 2)(x, np.zeros((1, 6), np.float32), weights)
    first = np.array([[2, 1, 0, 0, 0, 0]], np.float32)
    np.testing.assert_array_equal(even, operator(library, ISAS[-1], fixed, 32, 2)(x, first, weights))


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_not_finite_stays_in_its_row(library, isa):
    rng = np.random.default_rng(8)
    _, fixed = definition.stacked(rng, 5, 64, 64, 32)
    x, selection, weights = routed(rng, 12, 5, 64)
    run = operator(library, isa, fixed, 32, 2, limit=7)
    clean = run(x, selection, weights)
    x[3, 5] = np.nan
    selection[7] = np.nan  # some experts are taken all the same
    out = run(x, selection, weights)
    assert np.isnan(out[3]).all()
    np.testing.assert_array_equal(np.delete(out, [3, 7], 0), np.delete(clean, [3, 7], 0))


def test_wrong_forms_are_refused(library):
    rng = np.random.default_rng(9)
    _, fixed = definition.stacked(rng, 4, 64, 32, 32)
    x, selection, weights = routed(rng, 2, 4, 64)
    for top_k in (0, 5):
        with pytest.raises(Exception, match="top_k"):
            operator(library, ISAS[0], fixed, 32, top_k)(x, selection, weights)
    with pytest.raises(Exception, match="fit together"):
        operator(library, ISAS[0], fixed, 32, 1)(x, selection[:1], weights)
    with pytest.raises(Exception, match="form of"):
        operator(library, ISAS[0], fixed, 16, 1)(x, selection, weights)
