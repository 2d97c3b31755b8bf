"""Triton's interpreter as a memory checker: kernels index without bounds, and reading too far is not seen."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from triton.language import core
from triton.runtime import interpreter


def remember_types(patch: pytest.MonkeyPatch) -> None:
    """Let the interpreter describe each block shape once, which is a third of its time; none is changed."""
    describe, named = core.block_type.__init__, interpreter._get_np_dtype
    scalar_dtype = functools.cache(named)

    @functools.cache
    def sizes(shape):
        return core.tuple([core.constexpr(size) for size in shape]), core.constexpr(math.prod(shape))

    @functools.cache
    def block(shape):
        made = object.__new__(core.block_type)
        describe(made, core.int8, list(shape))
        return made.shape, made.numel, str(made.shape)

    def block_type(self, element_ty, shape):
        numbers = tuple(size.value if isinstance(size, core.constexpr) else size for size in shape)
        self.element_ty = element_ty
        self.shape, self.numel, text = block(numbers)
        self.name = f"<{text}, {element_ty}>"

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = sizes(type.shape if type.is_block() else ())

    def np_dtype(type):
        return named(type.scalar) if type.scalar.is_ptr() else scalar_dtype(type.scalar)

    patch.setattr(core.block_type, "__init__", block_type)
    patch.setattr(core.tensor, "__init__", tensor)
    patch.setattr(interpreter, "_get_np_dtype", np_dtype)


def _ranges(arguments) -> tuple[np.ndarray, np.ndarray]:
    """First byte and the one after the last of each tensor, ascending; those that overlap are one."""
    spans = sorted(
        (x.data_ptr(), x.data_ptr() + x.numel() * x.element_size())
        for x in arguments
        if isinstance(x, torch.Tensor)
    )
    merged: list[list[int]] = []
    for start, end in spans:
        if merged and start < merged[-1][1]:
            merged[-1][1] = max(end, merged[-1][1])
        else:
            merged.append([start, end])
    table = np.array(merged, np.uint64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


@pytest.fixture(autouse=True)
def within_bounds(monkeypatch):
    """Every element that a kernel reads or writes belongs to one of its arguments."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, given = builder.create_masked_load, builder.create_masked_store, executor._init_args_hst
    starts = ends = np.zeros(0, np.uint64)

    def check(pointers, mask):
        at = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.uint64)
        if not at.size:
            return
        size = pointers.get_element_ty().primitive_bitwidth // 8
        place = np.searchsorted(starts, at, "right") - 1
        assert (place >= 0).all(), "before all arguments"
        assert (at + np.uint64(size) <= ends[place]).all(), "after the end of an argument"

    def start(self, *arguments):
        nonlocal starts, ends
        host = given(self, *arguments)
        starts, ends = _ranges([*host[0], *host[1].values()])
        return host

    def checked_load(self, pointers, mask, *others):
        check(pointers, mask)
        return load(self, pointers, mask, *others)

    def checked_store(self, pointers, value, mask, *others):
        check(pointers, mask)
        return store(self, pointers, value, mask, *others)

    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)
    monkeypatch.setattr(executor, "_init_args_hst", start)
