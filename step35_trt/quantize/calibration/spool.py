"""Hidden states on disk between two stages: a stage reads one file and writes the next."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from step35_trt.journal import plain_os_errors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor


@dataclass(frozen=True)
class Spool:
    """fp32 `[tokens, width]` files, mapped: of what is not in use the kernel keeps what fits."""

    directory: Path
    tokens: int
    width: int

    def exists(self, index: int) -> bool:
        """Whether the states that stage `index` reads are there, whole."""
        return self._path(index).is_file()

    def read(self, index: int) -> Tensor:
        """What stage `index` reads; not to be written to."""
        # Mapped copy-on-write: torch takes no read-only array, and nothing writes.
        return torch.from_numpy(np.memmap(self._path(index), np.float32, "c", 0, (self.tokens, self.width)))

    @contextmanager
    def writing(self, index: int) -> Iterator[Tensor]:
        """A file of zeros to fill; it takes its name when the block ends well.

        Raises:
            DoesNotFitError: there is no room.
            UsageError: the place cannot be written.
        """
        path = self._path(index)
        partial = path.with_suffix(".partial")
        mapped = self._allocate(partial)
        yield torch.from_numpy(mapped)
        with plain_os_errors(path):
            mapped.flush()
            partial.rename(path)

    @contextmanager
    def scratch(self, name: str) -> Iterator[Tensor]:
        """As `writing`, for the length of the block only."""
        path = self.directory / f"{name}.scratch"
        try:
            yield torch.from_numpy(self._allocate(path))
        finally:
            path.unlink(missing_ok=True)

    def drop(self, index: int) -> None:
        """Forget what stage `index` read."""
        self._path(index).unlink(missing_ok=True)

    def _allocate(self, path: Path) -> np.memmap[tuple[int, int], np.dtype[np.float32]]:
        with plain_os_errors(path):
            with path.open("wb") as stream:
                # A write to a mapped hole on a full disk is a signal; asking for the room first is an error.
                os.posix_fallocate(stream.fileno(), 0, self.tokens * self.width * 4)
            return np.memmap(path, np.float32, "r+", 0, (self.tokens, self.width))

    def _path(self, index: int) -> Path:
        return self.directory / f"hidden-{index:03}.f32"
