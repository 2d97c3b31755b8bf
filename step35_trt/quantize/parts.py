"""One parameter on its way into a new checkpoint, in slices that threads take one by one.

Three ways lead there, and the fastest that is right is taken: bytes that already have the wanted form are
copied; what is stored in bf16 or fp32 goes straight from the file into the C routines; anything else, folded
or quantised already, is read as fp32 first.
"""

from __future__ import annotations

import math
import os
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from step35_trt.errors import CorruptInputError, UnsupportedError
from step35_trt.quantize import native
from step35_trt.quantize.folding import CLIP_RATIOS
from step35_trt.quantize.formats import DTYPES, Coding
from step35_trt.quantize.shard import entry_bytes, read_at, write_at

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from step35_trt.checkpoint import Checkpoint
    from step35_trt.quantize.folding import Folding, Scaling
    from step35_trt.quantize.formats import Entry
    from step35_trt.quantize.shard import Shard

SLICE_BYTES = 8 << 20  # of numbers as they are stored: two threads' buffers stay in a cache of some size
ROWS = 128  # slices of a matrix begin at multiples: no block of FP8 and no pair of int4 rows is cut


class Scratch:
    """Arrays that a thread uses again: fresh ones would cost a page fault for every 4 KiB."""

    def __init__(self) -> None:
        self._local = threading.local()

    def array(self, use: str, shape: tuple[int, ...], dtype: np.dtype) -> NDArray[np.generic]:
        """Uninitialised, valid until the thread asks for the same use again."""
        kept: dict[str, NDArray[np.uint8]] = self._local.__dict__.setdefault("kept", {})
        size = math.prod(shape) * dtype.itemsize
        if use not in kept or kept[use].size < size:
            kept[use] = np.empty(size, np.uint8)
        return kept[use][:size].view(dtype).reshape(shape)


@dataclass(frozen=True)
class Target:
    """A parameter and its new form; `entries` are the stored tensors."""

    name: str
    shape: tuple[int, ...]
    coding: Coding
    entries: dict[str, Entry]
    copied: bool

    @classmethod
    def of(cls, source: Checkpoint, name: str, coding: Coding, *, folded: bool) -> Target:
        """`coding` is the recipe's; what is folded and stays unquantised needs fp32 to hold its factors."""
        if folded and coding.kind == "bf16":
            coding = Coding("fp32")
        shape = source.shape(name)
        entries = coding.entries(name, shape)
        stored = {part: source.tensors.get(part) for part in entries}
        same = all(t is not None and (t.dtype, t.shape) == entries[part] for part, t in stored.items())
        return cls(name, shape, coding, entries, not folded and same and source.codings[name] == coding)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(map(entry_bytes, self.entries.values()))


@dataclass(frozen=True)
class Part:
    """Rows of a target along its first axis, or the bytes `start` to `stop` of one copied tensor."""

    target: Target
    start: int
    stop: int
    tensor: str = ""


def parts_of(target: Target) -> list[Part]:
    """The slices of a target, in order."""
    if target.copied:
        return [
            Part(target, start, min(start + SLICE_BYTES, size), tensor)
            for tensor, entry in target.entries.items()
            for size in (entry_bytes(entry),)
            for start in range(0, size, SLICE_BYTES)
        ]
    rows, *rest = target.shape
    step = max(1, SLICE_BYTES // (2 * math.prod(rest)))
    if len(rest) == 1:
        step = max(ROWS, step // ROWS * ROWS)
    return [Part(target, start, min(start + step, rows)) for start in range(0, rows, step)]


@dataclass
class Converter:
    """Reads, converts and writes parts; any number of threads may call it."""

    checkpoint: Checkpoint
    folding: Folding
    scratch: Scratch = field(default_factory=Scratch)
    _files: dict[str, int] = field(default_factory=dict)
    _scalings: dict[str, Scaling] = field(default_factory=dict)

    def close(self) -> None:
        """Let go of what was opened."""
        self._scalings.clear()
        while self._files:
            os.close(self._files.popitem()[1])

    def open(self, target: Target) -> None:
        """Get ready for a target's parts; not for threads, a folding may load its factors now."""
        if target.name in self.folding.scalings:
            self._scalings[target.name] = self.folding.scalings[target.name]
        for name in {target.name, *target.entries} & self.checkpoint.tensors.keys():
            file = str(self.checkpoint.tensors[name].file)
            if file not in self._files:
                self._files[file] = os.open(file, os.O_RDONLY)

    def convert(self, part: Part, shard: Shard, handle: int) -> int:
        """Write one part into its shard; returns the bytes written.

        Raises:
            CorruptInputError: a value is not finite, or the input ends early.
            UnsupportedError: a value has no place in the new form.
            OSError: the output cannot be written.
        """
        target = part.target
        if target.copied:
            data = self._bytes(part.tensor, part.start, part.stop - part.start)
            _check_copied(part.tensor, target.entries[part.tensor][0], data)
            return write_at(handle, data, shard.offsets[part.tensor] + part.start)
        values = self._values(part)
        kind = target.coding.kind
        if kind in ("fp32", "bf16"):
            return self._plain(part, values, shard, handle)
        count = part.stop - part.start
        held = {
            tensor: _rows_held(target.coding, tensor, shape) for tensor, (_, shape) in target.entries.items()
        }
        outputs = [
            self.scratch.array(use, (math.ceil(count / held[tensor]), *shape[1:]), DTYPES[dtype])
            for use, (tensor, (dtype, shape)) in zip(("codes", "scales"), target.entries.items(), strict=True)
        ]
        self._quantise(part, values, *outputs)
        written = 0
        for tensor, data in zip(target.entries, outputs, strict=True):
            first = part.start // held[tensor]
            written += write_at(handle, data, shard.offsets[tensor] + first * (data.nbytes // len(data)))
        return written

    def _plain(self, part: Part, values: NDArray[np.generic], shard: Shard, handle: int) -> int:
        target = part.target
        dtype = DTYPES[target.entries[target.name][0]]
        native.check_finite(target.name, values)
        data = values if values.dtype == dtype else values.astype(dtype)
        if data.dtype != values.dtype:
            native.check_finite(target.name, data)  # bf16 has fp32's range but for its rounding
        row = data.nbytes // len(data)
        return write_at(handle, data, shard.offsets[target.name] + part.start * row)

    def _quantise(
        self,
        part: Part,
        values: NDArray[np.generic],
        codes: NDArray[np.generic],
        scales: NDArray[np.generic],
    ) -> None:
        target, coding = part.target, part.target.coding
        ratios = self._ratios(part)
        if values.ndim == 2:
            values, codes, scales = values[None], codes[None], scales[None]
            ratios = None if ratios is None else ratios[None]
        for i, matrix in enumerate(values):
            clip = None if ratios is None else ratios[i]
            if coding.kind == "int4":
                native.int4_columns(target.name, matrix, coding.block, clip, codes[i], scales[i])
            elif coding.kind == "int8":
                native.int8_rows(target.name, matrix, coding.block, clip, codes[i], scales[i])
            else:
                rows, columns = (
                    (coding.block, coding.block) if coding.kind == "fp8-blocks" else (1, matrix.shape[-1])
                )
                native.fp8(target.name, matrix, rows, columns, codes[i], scales[i])

    def _ratios(self, part: Part) -> NDArray[np.float32] | None:
        scaling = self._scalings.get(part.target.name)
        if scaling is None or scaling.clip is None:
            return None
        coding, shape = part.target.coding, part.target.shape
        want = (*shape[:-1], shape[-1] // coding.block) if coding.kind in ("int4", "int8") else ()
        if scaling.clip.shape != want or scaling.clip.max(initial=0) >= len(CLIP_RATIOS):
            raise UnsupportedError(
                f"the folding clips {part.target.name} in groups of another recipe",
                "Calibrate with the recipe that is converted with.",
            )
        return np.ascontiguousarray(CLIP_RATIOS[scaling.clip[part.start : part.stop]])

    def _values(self, part: Part) -> NDArray[np.generic]:
        """bf16 or fp32, contiguous: `[rows, ...]` of the parameter."""
        name, target = part.target.name, part.target
        stored = self.checkpoint.tensors[name]
        scaling = self._scalings.get(name)
        if stored.dtype not in ("BF16", "F32") or scaling is not None:
            rows = slice(part.start, part.stop)
            values = self.checkpoint.read(name, rows)
            if scaling is not None:
                values = scaling.applied(values, len(target.shape), rows)
            return np.ascontiguousarray(values)
        row = stored.nbytes // target.shape[0]
        data = self._bytes(name, part.start * row, (part.stop - part.start) * row)
        numbers: NDArray[np.generic] = data.view(DTYPES[stored.dtype])
        return numbers.reshape(part.stop - part.start, *target.shape[1:])

    def _bytes(self, tensor: str, start: int, count: int) -> NDArray[np.generic]:
        stored = self.checkpoint.tensors[tensor]
        data = self.scratch.array("input", (count,), np.dtype(np.uint8))
        try:
            read_at(self._files[str(stored.file)], data, stored.offset + start)
        except EOFError:
            raise CorruptInputError(f"{stored.file.name} was cut while it was read") from None
        return data


def _rows_held(coding: Coding, tensor: str, shape: tuple[int, ...]) -> int:
    """How many rows of a matrix one row of a stored tensor stands for; of stacked experts, always one."""
    if len(shape) == 3 or "_scale" in tensor:
        return coding.block if len(shape) == 2 and tensor.endswith("_scale_inv") else 1
    return 2 if coding.kind == "int4" else 1


def _check_copied(tensor: str, dtype: str, data: NDArray[np.generic]) -> None:
    if dtype in ("BF16", "F32"):
        native.check_finite(tensor, data.view(DTYPES[dtype]))
    elif dtype == "F16" and not np.isfinite(data.view(np.float16)).all():
        raise CorruptInputError(f"{tensor} holds a NaN or an infinity")
    elif dtype == "F8_E4M3" and ((data.view(np.uint8) & 0x7F) == 0x7F).any():
        raise CorruptInputError(f"{tensor} holds a NaN")
