from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from step35_trt.errors import UnsupportedError
from step35_trt.kernels.plugin import load
from step35_trt.quantize.formats import int4_codes
from tests.cpu.plugins.sparse_moe.cases import pack


def random(seed, *shape):
    rng = np.random.default_rng(seed)
    scales = rng.standard_normal((*shape[:-1], shape[-1] // 128)).astype(np.float16)
    return rng.integers(0, 16, shape, dtype=np.uint8), scales


@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.integers(0, 99), st.lists(st.integers(1, 3), max_size=2), st.integers(1, 9), st.integers(1, 4))
def test_unpacking_is_the_inverse(seed, stack, n, blocks):
    codes, scales = random(seed, *stack, n, 128 * blocks)
    words, pairs = pack.pack_int4(codes, scales)
    assert (words.shape[len(stack) :], pairs.shape[len(stack) :]) == pack.shapes("int4", n, 128 * blocks)
    back = pack.unpack_int4(words, pairs)
    np.testing.assert_array_equal(back[0], codes)
    np.testing.assert_array_equal(back[1], scales)


@pytest.mark.parametrize("width", [128, 384])
def test_torch_unpacks_the_same(width):
    words, pairs = pack.pack_int4(*random(4, 7, width))
    unpack = load("sparse_moe", "weights").unpack_int4
    found = unpack(torch.from_numpy(words), torch.from_numpy(pairs))
    for one, other in zip(found, pack.unpack_int4(words, pairs), strict=True):
        np.testing.assert_array_equal(one.numpy(), other)


def test_experts_can_be_packed_one_by_one():
    codes, scales = random(1, 3, 5, 256)
    words, pairs = pack.pack_int4(codes, scales)
    for e in range(3):
        for whole, one in zip((words, pairs), pack.pack_int4(codes[e], scales[e]), strict=True):
            np.testing.assert_array_equal(whole[e], one)


def test_where_a_code_and_a_scale_lie():
    codes, scales = random(2, 7, 384)
    words, pairs = pack.pack_int4(codes, scales)
    row, block, nibble, column = 3, 1, 2, 17
    word = int(words.view(np.uint16)[row, 32 * block + column])
    assert word >> 4 * nibble & 15 == codes[row, 128 * block + 32 * nibble + column]
    halves = pairs.view(np.float16).reshape(2, 7, 2)
    assert halves[0, row].tolist() == scales[row, :2].tolist()
    assert halves[1, row].tolist() == [scales[row, 2], 0]


def test_what_the_format_cannot_hold_is_refused():
    codes, scales = random(3, 2, 128)
    with pytest.raises(UnsupportedError, match="multiple of 128"):
        pack.pack_int4(codes[:, :96], scales)
    with pytest.raises(UnsupportedError, match="fp16"):
        pack.pack_int4(codes, scales.astype(np.float32) * 0 + 70000)
    with pytest.raises(UnsupportedError, match="fp16"):
        pack.pack_int4(codes, scales * np.nan)


@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 1000))
def test_codes_are_laid_out_without_being_unpacked(pairs, blocks, seed):
    rng, k = np.random.default_rng(seed), 128 * blocks
    rows = rng.integers(0, 256, (pairs, k), np.uint8)
    scales = rng.normal(size=(2 * pairs, blocks)).astype(np.float16)
    codes = (int4_codes(rows, (2 * pairs, k), slice(0, 2 * pairs)) + 8).view(np.uint8)
    for one, other in zip(pack.repack_int4(rows, scales), pack.pack_int4(codes, scales), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
