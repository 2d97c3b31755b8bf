import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cpu.plugins import definition

ISAS = definition.available_isas()
relaxed = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def operator(library, isa, weight, n, block, **options):
    fixed = {"w": weight.tiles, "s": weight.scales}
    made = definition.session(library, isa, "Int4Linear", {"x": None}, fixed, N=n, block=block, **options)
    return lambda x: made.run(None, {"x": x})[0]


shapes = st.tuples(
    st.integers(0, 70), st.integers(1, 150), st.integers(1, 9), st.sampled_from([16, 32, 64, 128])
)


@relaxed
@given(shape=shapes, seed=st.integers(0, 1 << 30), size=st.sampled_from([1e-30, 1e-4, 1.0, 1e4, 1e18]))
def test_matches_the_definition_on_every_instruction_set_with_the_same_bits(library, shape, seed, size):
    t, n, blocks, block = shape
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((t, blocks * block)) * size).astype(np.float32)
    values = rng.standard_normal((n, blocks * block)) * np.exp(rng.normal(0, 2, (n, 1)))
    # Blocks of zeros on either side.
    x.reshape(t, blocks, block)[rng.random((t, blocks)) < 0.1] = 0
    values.reshape(n, blocks, block)[rng.random((n, blocks)) < 0.1] = 0
    weight = definition.Weight.of(values, block)
    outs = [operator(library, isa, weight, n, block)(x) for isa in ISAS]
    expected, bound = definition.linear(x, weight.values, block)
    assert outs[0].shape == (t, n)
    assert (np.abs(outs[0] - expected) <= bound).all()
    for out in outs[1:]:
        np.testing.assert_array_equal(out, outs[0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("block", [32, 128])
def test_a_row_does_not_depend_on_its_batch_nor_on_threads(library, isa, block):
    rng = np.random.default_rng(1)
    weight = definition.Weight.of(rng.standard_normal((203, 640)), block)
    x = rng.standard_normal((150, 640)).astype(np.float32)
    run = operator(library, isa, weight, 203, block)
    whole = run(x)
    alone = operator(library, isa, weight, 203, block, threads=1)
    for size in (*range(1, 14), 63, 64, 65, 150):
        for start in (0, 150 - size):
            np.testing.assert_array_equal(run(x[start : start + size]), whole[start : start + size])
    np.testing.assert_array_equal(alone(x), whole)
    for _ in range(20):
        np.testing.assert_array_equal(run(x), whole)


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_not_finite_shows_in_its_row_only(library, isa):
    rng = np.random.default_rng(2)
    weight = definition.Weight.of(rng.standard_normal((40, 256)), 64)
    run = operator(library, isa, weight, 40, 64)
    x = rng.standard_normal((20, 256)).astype(np.float32)
    clean = run(x)
    for row, bad in ((3, np.nan), (4, np.inf), (5, -np.inf)):
        x[row, 70] = bad
    out = run(x)
    assert not np.isfinite(out[3:6]).any()
    np.testing.assert_array_equal(np.delete(out, [3, 4, 5], 0), np.delete(clean, [3, 4, 5], 0))


@pytest.mark.parametrize("isa", ISAS)
def test_extreme_codes_do_not_overflow(library, isa):
    """All codes 15 or 0 against all activations of one sign: the largest dot products there are."""
    for code in (0, 15):
        codes = np.full((16, 64), code * 17, np.uint8)
        tiles, scales = definition.tile(codes, np.ones((16, 1), np.float32))
        weight = definition.Weight(np.full((16, 128), code - 8.0), tiles, scales)
        run = operator(library, isa, weight, 16, 128)
        for sign in (-1, 1):
            for t in (1, 5, 9):
                out = run(np.full((t, 128), 127.0 * sign, np.float32))
                np.testing.assert_array_equal(out, np.full((t, 16), 127.0 * sign * 128 * (code - 8)))


@pytest.mark.parametrize("isa", ISAS)
def test_products_of_one_input_are_what_each_is_alone(library, isa):
    rng = np.random.default_rng(4)
    weights = [definition.Weight.of(rng.standard_normal((n, 1152)), 64) for n in (192, 16, 48, 37)]
    fixed = {f"{k}{i}": v for i, w in enumerate(weights) for k, v in (("w", w.tiles), ("s", w.scales))}
    joined = definition.session(
        library, isa, "Int4Linear", {"x": None}, fixed, outputs=len(weights), N=37, block=64
    )
    for t in (0, 1, 3, 70):
        x = rng.standard_normal((t, 1152)).astype(np.float32)
        for y, weight in zip(joined.run(None, {"x": x}), weights, strict=True):
            alone = operator(library, isa, weight, len(weight.values), 64)
            np.testing.assert_array_equal(y, alone(x))


@relaxed
@given(data=st.data(), seed=st.integers(0, 1 << 30))
def test_gated_products_match_the_definition(library, data, seed):
    """Specification 2.7 on the way in: the clamp after SiLU, on both sides of up."""
    rng = np.random.default_rng(seed)
    block = data.draw(st.sampled_from([16, 64, 128]))
    t, n = data.draw(st.integers(0, 70)), data.draw(st.integers(1, 60))
    k = block * data.draw(st.one_of(st.integers(1, 9), st.just(2176 // block)))
    limit = data.draw(st.sampled_from([0.0, 0.5, 7.0]))
    gate, up = (rng.standard_normal((t, k)).astype(np.float32) * 5 for _ in range(2))
    weight = definition.Weight.of(rng.standard_normal((n, k)), block)
    fed, fixed = {"gate": None, "up": None}, {"w": weight.tiles, "s": weight.scales}
    outs = [
        definition.session(library, isa, "Int4GatedLinear", fed, fixed, N=n, block=block, limit=limit).run(
            None, {"gate": gate, "up": up}
        )[0]
        for isa in ISAS
    ]
    high, g, u = limit or np.inf, gate.astype(float), up.astype(float)
    h = np.minimum(g / (1 + np.exp(-g)), high) * np.clip(u, -high, high)
    want, bound = definition.linear(h, weight.values, block, wobble=1e-6 * np.abs(h))
    assert (np.abs(outs[0] - want) <= bound).all()
    for out in outs[1:]:
        np.testing.assert_array_equal(out, outs[0])


def test_wrong_forms_are_refused(library):
    weight = definition.Weight.of(np.ones((32, 128)), 64)
    with pytest.raises(Exception, match="form of 48 rows"):
        operator(library, ISAS[0], weight, 48, 64)(np.ones((1, 128), np.float32))
    with pytest.raises(Exception, match="form of 32 rows of 256"):
        operator(library, ISAS[0], weight, 32, 64)(np.ones((1, 256), np.float32))
    with pytest.raises(Exception, match="block is 24"):
        operator(library, ISAS[0], weight, 32, 24)
    with pytest.raises(Exception, match="STEP35_CPU_ISA"):
        operator(library, "none", weight, 32, 64)
