"""`blocks` in C (`plugins/convert`): the same bits at the speed of memory, from bf16 as stored or from fp32.

Calls release the interpreter, so threads add up.
"""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from step35_trt.cpu_library import CONVERTER, compiled
from step35_trt.errors import CorruptInputError, UnsupportedError

if TYPE_CHECKING:
    from numpy.typing import NDArray

BF16 = np.dtype(ml_dtypes.bfloat16)
BYTES, ROW_PAIRS, COLUMN_PAIRS = range(3)
NOT_FINITE, SCALE_OVERFLOW = 1, 2
MOST_GROUP = 4096


class _Source(ctypes.Structure):
    _fields_ = (
        ("values", ctypes.c_void_p),
        ("rows", ctypes.c_size_t),
        ("columns", ctypes.c_size_t),
        ("bf16", ctypes.c_int),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(compiled(CONVERTER)))
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    source = ctypes.POINTER(_Source)
    library.convert_integers.argtypes = [source, number, size, pointer, number, number, pointer, pointer]
    library.convert_fp8.argtypes = [source, size, size, pointer, pointer]
    library.convert_finite.argtypes = [source]
    library.convert_isa.restype = ctypes.c_char_p
    return library


def instruction_set() -> str:
    """The routines in use: "avx512", "avx2" or "portable"."""
    return str(_library().convert_isa().decode())


def int4_columns(
    name: str,
    weight: NDArray[np.generic],
    block: int,
    ratios: NDArray[np.float32] | None,
    codes: NDArray[np.uint8],
    scales: NDArray[np.float16],
) -> None:
    """`blocks.integers` in 4 bits, two rows to a byte in two's complement (`formats`).

    Args:
        name: For errors.
        weight: bf16 or fp32 `[N, K]`, contiguous.
        block: Values that share a scale.
        ratios: fp32 `[N, K / block]`, contiguous, or None.
        codes: Filled: `[ceil(N / 2), K]`.
        scales: Filled: `[N, K / block]`.

    Raises:
        CorruptInputError: a value is not finite.
        UnsupportedError: a scale does not fit fp16.
    """
    _integers(name, weight, 4, block, ratios, COLUMN_PAIRS, 0, codes, scales)


def int8_rows(
    name: str,
    weight: NDArray[np.generic],
    block: int,
    ratios: NDArray[np.float32] | None,
    codes: NDArray[np.int8],
    scales: NDArray[np.float16],
) -> None:
    """`blocks.integers` in 8 bits; codes `[N, K]`, the rest as in `int4_columns`."""
    _integers(name, weight, 8, block, ratios, BYTES, 0, codes, scales)


def quantize_blocks(
    name: str, weight: NDArray[np.float32], bits: int, block: int
) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """`blocks.quantize_blocks`, with the errors of `int4_columns`; `name` is for them."""
    *stack, k = weight.shape
    codes = np.empty((*stack, k * bits // 8), np.uint8)
    scales = np.empty((*stack, k // block), np.float16)
    layout = ROW_PAIRS if bits == 4 else BYTES
    _integers(name, weight.reshape(-1, k), bits, block, None, layout, 1 << (bits - 1), codes, scales)
    return codes, scales


def fp8(
    name: str,
    weight: NDArray[np.generic],
    rows: int,
    columns: int,
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32],
) -> None:
    """`blocks.fp8` of a matrix `[N, K]`; codes `[N, K]` as bytes. Errors as in `int4_columns`."""
    source, state = _source(weight), 0
    assert codes.shape == weight.shape
    assert codes.flags.c_contiguous
    assert scales.size == -(-weight.shape[0] // rows) * -(-weight.shape[1] // columns)
    state = _library().convert_fp8(ctypes.byref(source), rows, columns, codes.ctypes.data, scales.ctypes.data)
    _check(name, state)


def check_finite(name: str, values: NDArray[np.generic]) -> None:
    """See that bf16 or fp32 values hold no NaN and no infinity.

    Raises:
        CorruptInputError: they do.
    """
    _check(name, _library().convert_finite(ctypes.byref(_source(values.reshape(1, -1)))))


def _integers(
    name: str,
    weight: NDArray[np.generic],
    bits: int,
    block: int,
    ratios: NDArray[np.float32] | None,
    layout: int,
    offset: int,
    codes: NDArray[np.generic],
    scales: NDArray[np.float16],
) -> None:
    n, k = weight.shape
    assert block % 16 == 0
    assert block <= MOST_GROUP
    assert k % block == 0
    assert scales.size == n * k // block
    assert codes.nbytes == (-(-n // 2) * k if layout == COLUMN_PAIRS else n * k * bits // 8)
    assert codes.flags.c_contiguous
    assert scales.flags.c_contiguous
    assert ratios is None or (ratios.size == scales.size and ratios.flags.c_contiguous)
    source = _source(weight)
    state = _library().convert_integers(
        ctypes.byref(source),
        bits,
        block,
        None if ratios is None else ratios.ctypes.data,
        layout,
        offset,
        codes.ctypes.data,
        scales.ctypes.data,
    )
    _check(name, state)


def _source(weight: NDArray[np.generic]) -> _Source:
    assert weight.flags.c_contiguous
    assert weight.dtype in (BF16, np.float32)
    rows, columns = weight.shape
    return _Source(weight.ctypes.data, rows, columns, int(weight.dtype == BF16))


def _check(name: str, state: int) -> None:
    if state == NOT_FINITE:
        raise CorruptInputError(f"{name} holds a NaN or an infinity")
    if state == SCALE_OVERFLOW:
        raise UnsupportedError(f"{name} is too large for fp16 scales")
