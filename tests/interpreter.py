"""Triton's interpreter as a memory checker: kernels index without bounds, and reading too far is not seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from triton.runtime import interpreter


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
