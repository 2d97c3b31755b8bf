"""One safetensors file of a checkpoint, written at any place in any order by several threads."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from step35_trt.quantize.formats import DTYPES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from step35_trt.quantize.formats import Entry


def entry_bytes(entry: Entry) -> int:
    """Bytes of a tensor."""
    dtype, shape = entry
    return math.prod(shape) * int(DTYPES[dtype].itemsize)


@dataclass(frozen=True)
class Shard:
    """Where each tensor of a file lies.

    Attributes:
        name: The file's.
        header: Its first bytes.
        offsets: Of tensors, from the file's start.
        size: Bytes of the whole file.
    """

    name: str
    header: bytes
    offsets: dict[str, int]
    size: int

    @classmethod
    def lay_out(cls, name: str, entries: Mapping[str, Entry]) -> Shard:
        """Wide numbers come first, so that every tensor starts at a multiple of its own width."""
        order = sorted(entries, key=lambda tensor: -DTYPES[entries[tensor][0]].itemsize)
        table: dict[str, object] = {"__metadata__": {"format": "pt"}}  # what transformers asks for
        offsets, end = {}, 0
        for tensor in order:
            dtype, shape = entries[tensor]
            offsets[tensor], begin = end, end
            end += entry_bytes(entries[tensor])
            table[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 64)
        start = 8 + len(text)
        header = len(text).to_bytes(8, "little") + text
        return cls(name, header, {tensor: start + at for tensor, at in offsets.items()}, start + end)

    def open(self, folder: Path) -> int:
        """A descriptor for writing, with header and size in place."""
        handle = os.open(folder / self.name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            os.ftruncate(handle, self.size)
            write_at(handle, self.header, 0)
        except BaseException:
            os.close(handle)
            raise
        return handle


def write_at(handle: int, data: bytes | NDArray[np.generic], offset: int) -> int:
    """Write all of it; returns its bytes."""
    view = memoryview(data) if isinstance(data, bytes) else data.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(view):
        done += os.pwrite(handle, view[done:], offset + done)
    return done


def read_at(handle: int, into: NDArray[np.generic], offset: int) -> None:
    """Fill an array from a file.

    Raises:
        EOFError: the file ends before.
    """
    view = into.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(view):
        got = os.preadv(handle, [view[done:]], offset + done)
        if not got:
            raise EOFError(f"{len(view) - done} bytes short")
        done += got
