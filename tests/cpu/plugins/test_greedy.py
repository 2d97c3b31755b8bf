import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from tests.cpu.plugins import definition


def operator(library):
    node = helper.make_node("Greedy", ["logits"], ["tokens", "choices"], domain="step35")
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    ids = [helper.make_tensor_value_info(name, TensorProto.INT64, [None]) for name in node.output]
    return definition.loaded(
        library, definition.available_isas()[-1], helper.make_graph([node], "g", [logits], ids)
    )


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 5),
    columns=st.integers(1, 70),
    seed=st.integers(0, 1 << 30),
    bad=st.sampled_from([None, np.nan, np.inf, -np.inf]),
)
def test_the_likeliest_is_the_first_of_the_largest(library, rows, columns, seed, bad):
    rng = np.random.default_rng(seed)
    # Few different values, so that many are equal; zeros of both signs are.
    logits = (rng.integers(-3, 3, (rows, columns)) * rng.choice([-0.0, 1.0])).astype(np.float32)
    broken = np.zeros(rows, bool)
    if bad is not None and rows:
        broken[rng.integers(rows)] = True
        logits[broken, rng.integers(columns)] = bad
    run = operator(library)
    tokens, choices = run.run(None, {"logits": logits})
    expected = np.where(broken, -1, logits.argmax(axis=1) if columns else 0)
    assert tokens.dtype == choices.dtype == np.int64
    np.testing.assert_array_equal(choices, expected)
    np.testing.assert_array_equal(tokens[~broken], expected[~broken])
    assert ((tokens >= 0) & (tokens < columns)).all()


def test_a_vocabulary_of_the_real_width(library):
    logits = np.random.default_rng(0).standard_normal((40, 128_896)).astype(np.float32)
    run = operator(library)
    tokens, choices = run.run(None, {"logits": logits})
    np.testing.assert_array_equal(choices, logits.argmax(axis=1))
    np.testing.assert_array_equal(tokens, choices)


def test_logits_must_be_rows(library):
    run = operator(library)
    with pytest.raises(Exception, match="not \\[r, V\\]"):
        run.run(None, {"logits": np.zeros(3, np.float32)})
