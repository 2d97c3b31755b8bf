"""One packed safetensors file: laid out first, written afterwards, a page for the start of each tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from step35_trt.errors import CorruptInputError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

ALIGNMENT = 4096  # a page: a mapped tensor starts on its own
SAFETENSORS_DTYPES = {
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "float8_e4m3fn": "F8_E4M3",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
}
FLOATS = frozenset({"float32", "bfloat16", "float8_e4m3fn"})
# Bits that are all set in what is not finite, and integers to see them as: numpy is slow with these types.
UNENDING = {"bfloat16": (np.uint16, 0x7F80), "float8_e4m3fn": (np.uint8, 0x7F)}

Chunks = Callable[[], Iterator["NDArray[np.generic]"]]


@dataclass(frozen=True)
class Placed:
    """A tensor's place: file name within the bundle, byte offset, numpy dtype name and shape."""

    name: str
    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass
class WeightFile:
    """One safetensors file being laid out. Data starts after a header of fixed room."""

    name: str
    tensors: list[tuple[Placed, Chunks]] = field(default_factory=list)

    HEADER = 8 * ALIGNMENT

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return _aligned(self.tensors[-1][0].offset + self.tensors[-1][0].nbytes) if self.tensors else 0

    def place(self, name: str, dtype: str, shape: tuple[int, ...], chunks: Chunks) -> Placed:
        """Reserve room at the next page."""
        placed = Placed(name, self.name, self.size or self.HEADER, dtype, shape)
        self.tensors.append((placed, chunks))
        return placed

    def write(self, stream: BinaryIO) -> Iterator[int]:
        """Fill a file from its start; yields the bytes written after each slice.

        Raises:
            CorruptInputError: a weight is not finite; it is named.
        """
        stream.write(self._header())
        for placed, chunks in self.tensors:
            written = 0
            for chunk in chunks():
                whole = np.ascontiguousarray(chunk)
                if chunk.dtype.name in FLOATS and not _finite(whole):
                    raise CorruptInputError(f"{placed.name} holds a NaN or an infinity")
                data = whole.reshape(-1).view(np.uint8)
                stream.write(data.data)
                written += data.nbytes
                yield data.nbytes
            assert written == placed.nbytes, f"{placed.name}: {written} bytes for {placed.nbytes}"
            stream.write(bytes(_aligned(written) - written))

    def _header(self) -> bytes:
        entries: dict[str, object] = {"__metadata__": {"format": "step35-trt"}}
        for placed, _ in self.tensors:
            start = placed.offset - self.HEADER
            entries[placed.name] = _entry(
                SAFETENSORS_DTYPES[placed.dtype], placed.shape, start, placed.nbytes
            )
            # The format allows no holes: what fills a page is a tensor too.
            if gap := _aligned(placed.nbytes) - placed.nbytes:
                entries[f"{placed.name}.padding"] = _entry("U8", (gap,), start + placed.nbytes, gap)
        text = json.dumps(entries, separators=(",", ":")).encode()
        assert len(text) <= self.HEADER - 8, f"{self.name}: too many tensors for one header"
        return (self.HEADER - 8).to_bytes(8, "little") + text.ljust(self.HEADER - 8)


def file_name(weight: str) -> str:
    """The file of a bundle that a parameter goes into: one for each layer and for what is outside."""
    parts = weight.split(".")
    stem = f"layer-{int(parts[2]):02}" if parts[1] == "layers" else parts[0 if parts[0] == "lm_head" else 1]
    return f"weights/{stem}.safetensors"


def mapped(
    file: Path, dtype: np.dtype[np.generic], offset: int, shape: tuple[int, ...]
) -> NDArray[np.generic]:
    """A tensor of a file, read-only; unmapped when the array dies."""
    # Of a Path numpy would look up every link, each time.
    return np.memmap(str(file), dtype, "r", offset, shape)


def _finite(values: NDArray[np.generic]) -> bool:
    if values.dtype.name not in UNENDING:
        return bool(np.isfinite(values).all())
    integer, mask = UNENDING[values.dtype.name]
    bits = values.view(integer)
    return not bool(((bits & integer(mask)) == mask).any())


def _entry(dtype: str, shape: tuple[int, ...], start: int, nbytes: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + nbytes]}


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
