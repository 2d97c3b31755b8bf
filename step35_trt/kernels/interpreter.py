"""Triton 3.6's interpreter, made to run on today's numpy and to round and multiply as a GPU does."""

from __future__ import annotations

import functools
import os
import types
from typing import Any


def wanted() -> bool:
    """Whether kernels are to be interpreted on the CPU; Triton reads the variable when it meets a kernel."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def repair() -> None:
    """Mend what keeps our kernels from being interpreted; what is compiled for a GPU is not touched.

    A loaded number may bound a loop: the interpreter converts arrays of one element to it, which numpy 2.4
    refuses. Products of bf16 and e4m3 are the numbers': the interpreter multiplies the bits as integers. It
    truncates where bf16 is to be rounded, loses the carry out of e4m3's mantissa and drops its subnormals.
    And it replaces the language's functions anew at each call of a function in a kernel, which takes half the
    time.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patched(tensor: type, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar not in (tl.bfloat16, tl.float8e4nv):
            return handle
        bits = _convert(handle.data, handle.dtype.scalar, tl.float32)
        return interpreter.TensorHandle(bits.view("float32"), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        return dot(self, widened(a), widened(b), d, *precision)

    interpreter._patch_lang_tensor = patched
    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter._convert_float = _convert
    interpreter._patch_lang = _once(interpreter._patch_lang, (tl, tl.core))


def _convert(bits: Any, source: Any, target: Any, _: Any = None) -> Any:
    """Bits of floats of type `source` as bits of type `target`, rounded to nearest even."""
    import ml_dtypes
    import numpy as np

    formats = {
        "fp8e4nv": ml_dtypes.float8_e4m3fn,
        "fp8e5": ml_dtypes.float8_e5m2,
        "bf16": ml_dtypes.bfloat16,
        "fp16": np.float16,
        "fp32": np.float32,
        "fp64": np.float64,
    }
    numbers = np.ascontiguousarray(bits).view(formats[source.name])
    with np.errstate(over="ignore", invalid="ignore"):
        wide = numbers.astype(np.float32) if source.primitive_bitwidth < 32 else numbers
        return wide.astype(formats[target.name]).view(f"uint{target.primitive_bitwidth}")


class _Kept:
    def restore(self) -> None:
        """What was replaced stays replaced."""


def _once(replace: Any, language: tuple[types.ModuleType, ...]) -> Any:
    """`replace`, which is handed a function, for the modules of the language that it names, each set once."""

    @functools.cache
    def replace_in(*modules: types.ModuleType) -> _Kept:
        replace(types.SimpleNamespace(__globals__=dict(enumerate(modules))))
        return _Kept()

    def replace_once(function: Any) -> _Kept:
        seen = function.__globals__.values()
        return replace_in(*(module for module in language if any(module is value for value in seen)))

    return replace_once
