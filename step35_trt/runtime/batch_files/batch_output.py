"""A batch's output file: appended line by line, resumable after any interruption, renamed once complete."""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import to_json

from step35_trt.errors import NO_ROOM, DoesNotFitError, Step35Error, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from io import FileIO
    from pathlib import Path
    from types import TracebackType

SYNC_SECONDS = 5.0  # what a power cut can cost; a killed process loses nothing
_BEGINNING = b'{"id":"batch_req_'


class _Usage(BaseModel):
    model_config = ConfigDict(extra="ignore")
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore")
    usage: _Usage = _Usage()


class _Response(BaseModel):
    model_config = ConfigDict(extra="ignore")
    status_code: int
    body: _Body


class Recorded(BaseModel):
    """What a resumed run needs to know of a line that is already there."""

    model_config = ConfigDict(extra="ignore")
    id: str
    custom_id: str | None
    response: _Response

    @property
    def failed(self) -> bool:
        """Whether the line answers with an error."""
        return self.response.status_code != 200

    @property
    def usage(self) -> tuple[int, int]:
        """Prompt tokens and generated tokens."""
        return self.response.body.usage.prompt_tokens, self.response.body.usage.completion_tokens


class ResumableOutput:
    """The file `path` while it is being written, under the name `path`.partial.

    Entering takes the file for this process alone and drops a line that was cut off. `recorded` must be read
    to its end before the first `append`.

    Args:
        path: The finished file. If it is there already, it is only read.

    Raises:
        UsageError: on entering, when the file cannot be written or another process is writing it.
        DoesNotFitError: the disk is full.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.finished = path.exists()
        self.lines = 0
        self._file: FileIO | None = None
        self._synced = time.monotonic()

    def __enter__(self) -> Self:
        if self.finished:
            return self
        try:
            self._file = open(self.partial, "a+b", buffering=0)
        except OSError as error:
            raise UsageError(f"cannot write {self.partial}: {error.strerror}") from None
        try:
            self._take()
            with self._failures():
                self._drop_torn_line()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        with suppress(OSError):  # a complete file is synced already, else another error is under way
            os.fsync(self._file.fileno())
            if error is not None and not os.fstat(self._file.fileno()).st_size:
                self.partial.unlink()  # nothing to go on from
        self._file.close()

    def recorded(self) -> Iterator[Recorded]:
        """The lines that earlier runs have written, in order.

        Raises:
            UsageError: a line is not what this command writes.
        """
        path = self.path if self.finished else self.partial
        try:
            with path.open("rb") as lines:
                for line in lines:
                    record = Recorded.model_validate_json(line)
                    self.lines += 1
                    yield record
        except ValidationError:
            raise UsageError(
                f"line {self.lines + 1} of {path} is not an answer of a batch",
                "Move that file away or choose another output.",
            ) from None
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from None

    def append(self, record: Mapping[str, object]) -> None:
        """Write one line through to the operating system.

        Raises:
            DoesNotFitError: the disk is full.
            Step35Error: the system refuses for another reason.
        """
        assert self._file is not None
        rest = memoryview(to_json(record) + b"\n")
        with self._failures():
            while rest:
                rest = rest[self._file.write(rest) or 0 :]
            self.lines += 1
            if time.monotonic() - self._synced >= SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()

    def finish(self) -> None:
        """Give the complete file its name.

        Raises:
            Step35Error: the system refuses.
        """
        if self._file is None:
            return
        with self._failures():
            os.fsync(self._file.fileno())
            if sys.platform == "win32":  # an open file cannot be renamed there
                self._file.close()
                self._file = None
            os.replace(self.partial, self.path)
            if sys.platform != "win32":
                folder = os.open(self.path.parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)

    def _take(self) -> None:
        if sys.platform == "win32":
            return
        import fcntl

        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process is writing {self.partial}") from None
        except OSError:  # a file system without locks
            return

    def _drop_torn_line(self) -> None:
        assert self._file is not None
        end = position = self._file.seek(0, os.SEEK_END)
        tail = b""
        while position and b"\n" not in tail:
            step = min(position, 1 << 16)
            position = self._file.seek(position - step)
            tail = self._file.read(step) + tail
        torn = tail[tail.rfind(b"\n") + 1 :]
        if not torn:
            return
        # After a power cut a file system may have filled the end with zeros.
        written = torn.rstrip(b"\0")
        if written[: len(_BEGINNING)] != _BEGINNING[: len(written)]:
            raise UsageError(
                f"{self.partial} is not an output of this command", "Move it away or choose another output."
            )
        self._file.truncate(end - len(torn))

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            message = f"cannot write {self.partial}: {error.strerror}"
            hint = f"The lines written so far are safe ({self.lines}); run the same command again to go on."
            if error.errno in NO_ROOM:
                raise DoesNotFitError(message, f"Make room. {hint}") from None
            raise Step35Error(message, hint) from None
