import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from step35_trt.errors import UnsupportedError
from step35_trt.quantize.blocks import quantize_blocks
from step35_trt.quantize.cpu_layout import interleave_gate_up, tile, tiled_shapes
from tests.codes import untile


@settings(deadline=None, derandomize=True)
@given(data=st.data(), n=st.integers(1, 70), k=st.integers(1, 6), stack=st.sampled_from([(), (3,)]))
def test_untile_is_the_inverse(data, n, k, stack):
    codes = data.draw(arrays.arrays(np.uint8, (*stack, n, 16 * k)))
    scales = np.random.default_rng(n).standard_normal((*stack, n, k)).astype(np.float16).astype(np.float32)
    tiles, halves = tile(codes, scales)
    assert (tiles.shape, halves.shape) == tiled_shapes((*stack, n, 32 * k), 32)
    again = untile(tiles, halves, n)
    np.testing.assert_array_equal(again[0], codes)
    np.testing.assert_array_equal(again[1], scales)


def test_the_layout_is_what_the_header_says():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (20, 64), dtype=np.uint8)
    tiles, scales = tile(codes[:, 0::2] | codes[:, 1::2] << 4, np.arange(40, dtype=np.float32).reshape(20, 2))
    padded = np.zeros((32, 64), np.uint8)
    padded[:20] = codes
    for row in range(32):
        for column in range(64):
            byte = tiles[row // 16, column // 8, 4 * (row % 16) + column % 4]
            assert byte >> (4 * (column % 8 // 4)) & 15 == padded[row, column]
    assert scales[1, 1, 3] == 39
    assert (scales[1, :, 4:] == 0).all()


def test_row_groups_can_be_written_one_by_one():
    codes, scales = quantize_blocks(
        np.random.default_rng(1).standard_normal((50, 128)).astype(np.float32), 4, 64
    )
    whole = tile(codes, scales)
    parts = [tile(codes[i : i + 16], scales[i : i + 16]) for i in range(0, 50, 16)]
    for i in (0, 1):
        np.testing.assert_array_equal(np.concatenate([part[i] for part in parts]), whole[i])


def test_gate_and_up_take_turns_by_tiles():
    gate, up = np.arange(32)[:, None], np.arange(100, 132)[:, None]
    both = interleave_gate_up(gate, up)[:, 0]
    assert both.tolist() == [*range(16), *range(100, 116), *range(16, 32), *range(116, 132)]


def test_what_does_not_fit_is_refused():
    with pytest.raises(UnsupportedError, match="too large"):
        tile(np.zeros((16, 8), np.uint8), np.full((16, 1), 7e4, np.float32))
    with pytest.raises(UnsupportedError, match="blocks of 24"):
        tiled_shapes((16, 48), 24)
    with pytest.raises(UnsupportedError, match="40 features"):
        interleave_gate_up(np.zeros((40, 2)), np.zeros((40, 2)))
