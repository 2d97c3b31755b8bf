"""Triton's interpreter for tests (`TRITON_INTERPRET=1`): it rounds as a GPU does.

Triton 3.6's interpreter truncates where bf16 is to be rounded, loses the carry out of e4m3's mantissa and
drops its subnormals. And it replaces the language's functions anew at each call of a function in a kernel,
which takes half the time.
"""

import functools
import types

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

FORMATS = {
    "fp8e4nv": ml_dtypes.float8_e4m3fn,
    "fp8e5": ml_dtypes.float8_e5m2,
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "fp32": np.float32,
    "fp64": np.float64,
}
_replace = interpreter._patch_lang


def _convert(bits, source, target, rounding):
    """Bits of floats of type `source` as bits of type `target`, rounded to nearest even."""
    numbers = np.ascontiguousarray(bits).view(FORMATS[source.name])
    with np.errstate(over="ignore", invalid="ignore"):
        wide = numbers.astype(np.float32) if source.primitive_bitwidth < 32 else numbers
        return wide.astype(FORMATS[target.name]).view(f"uint{target.primitive_bitwidth}")


class _Kept:
    def restore(self):
        """What was replaced stays replaced."""


@functools.cache
def _replace_in(*modules):
    _replace(types.SimpleNamespace(__globals__=dict(enumerate(modules))))
    return _Kept()


def _replace_once(function):
    seen = function.__globals__.values()
    return _replace_in(*(module for module in (tl, tl.core) if any(module is value for value in seen)))


interpreter._convert_float = _convert
interpreter._patch_lang = _replace_once
