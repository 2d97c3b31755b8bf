"""A sequence's hidden rows of one graph, held back for the MTP module that continues from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from step35_trt.runtime.session import Floats


class HiddenRows:
    """Rows `first .. end-1` of one producer, `[*, D]` fp32, in a buffer that grows as needed."""

    def __init__(self, first: int) -> None:
        self.first = self.end = first
        self._origin = first  # the row that lies at the buffer's start
        self._buffer: Floats = np.empty((0, 0), dtype=np.float32)

    def __len__(self) -> int:
        return self.end - self.first

    def append(self, rows: Floats) -> None:
        """The rows that follow."""
        end = self.end + len(rows)
        if end - self._origin > len(self._buffer):
            grown = np.empty((2 * (end - self.first), rows.shape[1]), dtype=np.float32)
            if self.end > self.first:
                grown[: len(self)] = self.read(self.first, self.end)
            self._buffer, self._origin = grown, self.first
        self._buffer[self.end - self._origin : end - self._origin] = rows
        self.end = end

    def read(self, first: int, end: int) -> Floats:
        """Rows `first .. end-1`; valid until rows are appended."""
        return self._buffer[first - self._origin : end - self._origin]

    def drop(self, first: int) -> None:
        """Forget rows before `first`."""
        self.first = max(self.first, first)

    def cut(self, end: int) -> None:
        """Forget rows from `end` on."""
        self.end = min(self.end, end)
