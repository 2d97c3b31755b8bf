"""Triton 3.6's interpreter, made to run on today's numpy and to multiply bf16."""

from __future__ import annotations

import functools
import os
from typing import Any


def wanted() -> bool:
    """Whether kernels are to be interpreted on the CPU; Triton reads the variable when it meets a kernel."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def repair() -> None:
    """Mend what keeps our kernels from being interpreted; what is compiled for a GPU is not touched.

    A loaded number may bound a loop: the interpreter converts arrays of one element to it, which numpy 2.4
    refuses. And products of bf16 are the numbers': the interpreter multiplies the 16 bits as integers.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    patch, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patched(tensor: type, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        wide = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(wide, tl.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        return dot(self, widened(a), widened(b), d, *precision)

    interpreter._patch_lang_tensor = patched
    interpreter.InterpreterBuilder.create_dot = create_dot
