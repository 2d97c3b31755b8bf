"""What the files of a bundle are compared by: small ones whole, weights by a sample or, when asked, in all.

A file of weights has a BLAKE2b-256 of a few blocks spread over it, which every load can afford and which
tells a file of another build or a torn copy; and the CRC-32 of each of its pieces, which `inspect --check`
reads. A CRC finds every single flipped bit and every burst of up to 32 with certainty, and on two cores it
keeps up with a disk, which a cryptographic hash does not.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from step35_trt.parallel import in_order

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from step35_trt.progress import Progress

# These are part of a bundle's schema: another value reads other bytes.
BLOCK = 4096  # a page, which is what a disk reads at least
BLOCKS = 16
PIECE = 64 << 20
BUFFER = 1 << 20
THREADS = min(8, os.cpu_count() or 1)


class FileRecord(BaseModel):
    """A file's size in bytes and what its content is compared by.

    Attributes:
        size: In bytes.
        blake2b: BLAKE2b-256 of a small file; empty for weights.
        sample: BLAKE2b-256 of the blocks at `sampled_offsets` of a file of weights.
        crc32: Of each `PIECE` of a file of weights, in order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    size: int
    blake2b: str = ""
    sample: str = ""
    crc32: tuple[int, ...] = ()

    @classmethod
    def small(cls, path: Path) -> FileRecord:
        """Of a file that every load reads whole."""
        return cls(size=path.stat().st_size, blake2b=digest(path))

    @classmethod
    def weights(cls, path: Path) -> FileRecord:
        """Of a file that loads only look into."""
        size = path.stat().st_size
        pieces = range(0, size, PIECE)
        found = tuple(in_order(lambda start: crc32(path, start), pieces, THREADS))
        return cls(size=size, sample=sample(path), crc32=found)

    def resembles(self, path: Path) -> bool:
        """Whether a file of this size has what a load looks at: all of it, or the sampled blocks."""
        return self.blake2b == digest(path) if self.blake2b else self.sample == sample(path)


def digest(path: Path) -> str:
    """BLAKE2b-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def sampled_offsets(size: int) -> tuple[int, ...]:
    """Where the blocks of a sample begin: the first, the last, and others evenly between, on pages."""
    last = max(0, size - BLOCK)
    between = (last * k // (BLOCKS - 1) // BLOCK * BLOCK for k in range(BLOCKS - 1))
    return tuple(sorted({*between, last}))


def sample(path: Path) -> str:
    """BLAKE2b-256 of a file's sampled blocks, one after the other."""
    found = hashlib.blake2b(digest_size=32)
    handle = os.open(path, os.O_RDONLY)
    try:
        for offset in sampled_offsets(os.fstat(handle).st_size):
            found.update(os.pread(handle, BLOCK, offset))
    finally:
        os.close(handle)
    return found.hexdigest()


def crc32(path: Path, start: int) -> int:
    """CRC-32 of the piece that begins at `start`."""
    buffer, found, left = memoryview(bytearray(BUFFER)), 0, PIECE
    with path.open("rb", buffering=0) as stream:
        stream.seek(start)
        while left and (count := stream.readinto(buffer[: min(BUFFER, left)])):
            found, left = zlib.crc32(buffer[:count], found), left - count
    return found


def unlike(directory: Path, files: Mapping[str, FileRecord]) -> Iterator[str]:
    """Names of files that do not resemble what was recorded: what a load can afford to look at."""
    found = in_order(lambda name: files[name].resembles(directory / name), list(files), THREADS)
    return (name for name, right in zip(files, found, strict=True) if not right)


def damaged(directory: Path, files: Mapping[str, FileRecord], progress: Progress | None = None) -> list[str]:
    """Names of files whose content is not what was recorded, in the order of `files`; reads everything.

    Files of weights are read piece by piece on several threads, as many as a fast disk needs.
    """
    checks = [_Check(name, 0, record.size) for name, record in files.items() if record.blake2b]
    for name, record in files.items():
        checks += [
            _Check(name, start, min(PIECE, record.size - start))
            for start in range(0, len(record.crc32) * PIECE, PIECE)
        ]

    def passes(check: _Check) -> bool:
        path, record = directory / check.file, files[check.file]
        if path.stat().st_size != record.size:
            return False
        if record.blake2b:
            return digest(path) == record.blake2b
        return crc32(path, check.start) == record.crc32[check.start // PIECE]

    total, done = sum(check.nbytes for check in checks), 0
    found = set()
    for check, right in zip(checks, in_order(passes, checks, THREADS), strict=True):
        done += check.nbytes
        if not right:
            found.add(check.file)
        if progress:
            progress(done, total, check.file)
    return [name for name in files if name in found]


@dataclass(frozen=True)
class _Check:
    """A part of a file that is compared at once."""

    file: str
    start: int
    nbytes: int
