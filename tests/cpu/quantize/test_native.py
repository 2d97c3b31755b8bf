"""The C routines give the bits of their definition in numpy, on every instruction set."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step35_trt.errors import CorruptInputError, UnsupportedError
from step35_trt.quantize import blocks, native
from step35_trt.quantize.formats import int4_codes

BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("STEP35_CPU_ISA", request.param)
    if native.instruction_set() != request.param:
        pytest.skip(f"no {request.param} here")
    return str(request.param)


def weights(seed: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Many exponents, with zeros, equal magnitudes of both signs and zero blocks."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 1, shape) * 2.0 ** rng.integers(-40, 12, (*shape[:-1], 1))
    values *= 2.0 ** rng.integers(-14, 1, shape)
    values[rng.random(shape) < 0.1] = 0
    values[rng.random(shape) < 0.05] = 0.5
    values[rng.random(shape) < 0.05] = -0.5
    values[rng.random(shape[:-1]) < 0.1] = 0
    if rng.random() < 0.3:  # magnitudes near the end of fp32, where scales are denormal
        values *= 1e-37
    return values.astype(np.float32).astype(dtype)


@given(
    seed=st.integers(0, 1 << 30),
    n=st.integers(1, 7),
    groups=st.integers(1, 4),
    block=st.sampled_from([16, 32, 64, 128]),
    bits=st.sampled_from([4, 8]),
    dtype=st.sampled_from([BF16, np.dtype(np.float32)]),
    clipped=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def _integers_agree(
    seed: int, n: int, groups: int, block: int, bits: int, dtype: np.dtype, clipped: bool
) -> None:
    w = weights(seed, (n, groups * block), dtype)
    ratios = None
    if clipped:
        ratios = np.random.default_rng(seed).choice(np.arange(16, 33, dtype=np.float32) / 32, (n, groups))
    codes, scales = blocks.integers(w.astype(np.float32), bits, block, ratios)
    got = np.empty((n, groups), np.float16)
    if bits == 8:
        plain = np.empty(w.shape, np.int8)
        native.int8_rows("w", w, block, ratios, plain, got)
    else:
        packed = np.empty((-(-n // 2), w.shape[1]), np.uint8)
        native.int4_columns("w", w, block, ratios, packed, got)
        plain = int4_codes(packed, w.shape, slice(0, n))
        assert n % 2 == 0 or not (packed[-1] >> 4).any()
    np.testing.assert_array_equal(plain, codes)
    np.testing.assert_array_equal(got.view(np.uint16), scales.view(np.uint16))
    if dtype == np.float32 and not clipped:
        ours, factors = native.quantize_blocks("w", w, bits, block)
        expected, _ = blocks.quantize_blocks(w, bits, block)
        np.testing.assert_array_equal(ours, expected)
        np.testing.assert_array_equal(factors.view(np.uint16), scales.view(np.uint16))


@given(
    seed=st.integers(0, 1 << 30),
    n=st.integers(1, 40),
    k=st.integers(1, 70),
    block=st.sampled_from([(1, 0), (16, 16), (16, 32), (128, 128)]),
    dtype=st.sampled_from([BF16, np.dtype(np.float32)]),
)
@settings(max_examples=60, deadline=None)
def _fp8_agrees(seed: int, n: int, k: int, block: tuple[int, int], dtype: np.dtype) -> None:
    rows, columns = block[0], block[1] or k
    w = weights(seed, (n, k), dtype)
    codes, scales = blocks.fp8(w.astype(np.float32), rows, columns)
    ours, factors = np.empty(w.shape, np.uint8), np.empty(scales.shape, np.float32)
    native.fp8("w", w, rows, columns, ours, factors)
    np.testing.assert_array_equal(factors.view(np.uint32), scales.view(np.uint32))
    np.testing.assert_array_equal(ours, codes.view(np.uint8))


def test_integers(isa: str) -> None:
    _integers_agree()


def test_fp8(isa: str) -> None:
    _fp8_agrees()


def test_every_bf16_number_as_fp8(isa: str) -> None:
    """All of them as neighbours of 448, whose scale is 1: rounding, ties and denormals."""
    every = np.arange(1 << 16, dtype=np.uint16).view(BF16)
    every = every[np.abs(every.astype(np.float32)) <= 448]
    w = np.concatenate([np.full(1, 448, BF16), every])[None]
    codes, scale = np.empty(w.shape, np.uint8), np.empty((1, 1), np.float32)
    native.fp8("w", w, 1, w.shape[1], codes, scale)
    assert scale == 1
    np.testing.assert_array_equal(codes, w.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)])
def test_what_is_not_finite_is_named(isa: str, bad: float, dtype: np.dtype) -> None:
    w = np.ones((3, 37), np.float32).astype(dtype)
    w[2, 36] = bad
    with pytest.raises(CorruptInputError, match="lm_head holds a NaN"):
        native.check_finite("lm_head", w)
    with pytest.raises(CorruptInputError, match="lm_head"):
        native.fp8("lm_head", w, 1, 37, np.empty(w.shape, np.uint8), np.empty((3, 1), np.float32))
    w = np.ones((3, 32), np.float32).astype(dtype)
    w[2, 31] = bad
    with pytest.raises(CorruptInputError, match="lm_head"):
        native.int8_rows("lm_head", w, 16, None, np.empty(w.shape, np.int8), np.empty((3, 2), np.float16))


def test_a_scale_beyond_fp16_is_refused(isa: str) -> None:
    w = np.full((2, 16), 8 * 65520, np.float32)
    with pytest.raises(UnsupportedError, match="too large"):
        native.int4_columns("w", w, 16, None, np.empty((1, 16), np.uint8), np.empty((2, 1), np.float16))
