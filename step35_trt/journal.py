"""Building under a staging name: what is finished is remembered, what is whole is renamed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from step35_trt import bundle
from step35_trt.digests import FileRecord
from step35_trt.errors import NO_ROOM, DoesNotFitError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

JOURNAL = "journal.jsonl"


@dataclass
class Journal:
    """Which files are finished, one JSON line each; lines survive the process, a torn last one is dropped."""

    path: Path
    records: dict[str, FileRecord] = field(default_factory=dict)

    @classmethod
    def open(cls, stage: Path, key: str) -> Journal:
        """Go on with the journal of a staging directory, or empty it where the key is another."""
        journal = cls(stage / JOURNAL)
        lines = journal.path.read_text(encoding="utf-8").split("\n") if journal.path.exists() else []
        if not lines or lines[0] != key:
            for old in stage.iterdir():
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            journal.path.write_text(f"{key}\n", encoding="utf-8")
            lines = [key]
        for line in lines[1:]:
            try:
                entry = json.loads(line)
                record = FileRecord.model_validate(entry["record"])
                if (stage / entry["file"]).stat().st_size == record.size:
                    journal.records[entry["file"]] = record
            except (ValueError, KeyError, TypeError, OSError):
                continue
        return journal

    def finished(self, file: str) -> bool:
        """Whether an earlier run, or this one, has written the file."""
        return file in self.records

    def finish(self, file: str, *, hashed: bool = True) -> None:
        """Record a written file: synced, with its digests where a manifest will want them."""
        path = self.path.parent / file
        bundle.sync(path)
        record = bundle.record(path, file) if hashed else FileRecord(size=path.stat().st_size)
        if file.startswith("weights/"):
            # Pages taken while a build fills the memory are scattered: what lay in them was read at 18 GB/s,
            # what came from the disk in one go at 23.
            bundle.forget(path)
        self.records[file] = record
        with self.path.open("a", encoding="utf-8") as stream:
            # The newline comes first: a line torn by a crash cannot swallow this one.
            stream.write("\n" + json.dumps({"file": file, "record": record.model_dump()}))
            stream.flush()
            os.fsync(stream.fileno())


@contextmanager
def staged(out: Path, key: str, sizes: dict[str, int]) -> Iterator[tuple[Path, Journal]]:
    """The staging directory, locked; it takes the bundle's name when all went well.

    Args:
        out: The bundle.
        key: What it is built from; another key's unfinished work is dropped.
        sizes: Bytes of every file to come, as far as they are known.

    Raises:
        UsageError: another build is at it, or the place cannot be written.
        DoesNotFitError: there is no room.
    """
    stage = bundle.staging(out)
    with plain_os_errors(stage):
        stage.mkdir(parents=True, exist_ok=True)
        handle = os.open(stage, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"another build is writing {stage}") from None
            journal = Journal.open(stage, key)
            for file in sizes:
                (stage / file).parent.mkdir(exist_ok=True)
            try:
                _check_room(stage, sizes, journal)
            except DoesNotFitError:
                if not journal.records:
                    shutil.rmtree(stage)  # nothing to go on from
                raise
            yield stage, journal
            journal.path.unlink()
            bundle.sync(stage)
            place = Path(os.path.realpath(out))
            if place.is_dir():
                place.rmdir()  # an empty directory, made for us
            stage.rename(place)
            bundle.sync(place.parent)
        finally:
            os.close(handle)


def check_room(stage: Path, expected: int, *others: Path) -> None:
    """See that files of `expected` bytes in all fit beside what lies there of them; writes nothing.

    Args:
        stage: Where they go.
        expected: Bytes of all of them.
        others: Folders that some of them go to instead.

    Raises:
        DoesNotFitError: they do not.
    """
    folders = stage, *others
    there = (path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    _compare_room(stage, expected - sum(there))


def _check_room(stage: Path, sizes: dict[str, int], journal: Journal) -> None:
    _compare_room(stage, sum(size for file, size in sizes.items() if not journal.finished(file)))


def _compare_room(stage: Path, needed: int) -> None:
    place = next(path for path in (stage, *stage.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise DoesNotFitError(
            f"the bundle needs {_gigabytes(needed)} more and {stage.parent} has {_gigabytes(free)} free"
        )


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A stream that becomes `path` when all is written, and leaves nothing otherwise.

    What is no file, such as a pipe or /dev/stdout, gets all of it at the end: formats want to seek.

    Raises:
        UsageError: the place cannot be written.
        DoesNotFitError: there is no room.
    """
    with plain_os_errors(path):
        if path.is_dir():
            raise UsageError(f"cannot write {path}: it is a directory", "Name a file in it.")
        if path.exists() and not path.is_file():
            with tempfile.TemporaryFile() as whole:
                yield whole
                whole.seek(0)
                with path.open("wb") as stream:
                    shutil.copyfileobj(whole, stream)
            return
        place = Path(os.path.realpath(path))  # a link stays one, /dev/stdout above all
        partial = place.with_name(f"{place.name}.{os.getpid()}.partial")  # of this process alone
        try:
            with partial.open("wb") as stream:
                yield stream
            partial.rename(place)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def plain_os_errors(stage: Path) -> Iterator[None]:
    """Turn what the file system refuses into a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise DoesNotFitError(
                f"no room left while writing {stage}",
                "Make room and run the same command again; a build keeps what it has finished.",
            ) from None
        reason = error.strerror or str(error)
        if error.filename is not None and not Path(error.filename).is_relative_to(stage.parent):
            reason = f"{error.filename}: {reason}"
        raise UsageError(f"cannot write {stage}: {reason}") from None
