"""A batch file's lines: one request in, one answer or error out."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from step35_trt.errors import DoesNotFitError, Step35Error, UnsupportedError, UsageError
from step35_trt.runtime.dialogue.chat import explain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from io import BufferedReader
    from pathlib import Path

    Answer = Callable[["Request", str], dict[str, Any]]

MAX_LINE_BYTES = 32 << 20  # many times the longest context, escaped as badly as can be


class Request(BaseModel):
    """One line of the input; other keys than these do not concern the answer."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)
    custom_id: str = Field(min_length=1)
    method: Literal["POST"] = "POST"
    url: Literal["/v1/chat/completions", "/v1/completions"] | None = None
    body: dict[str, Any]


@dataclass(frozen=True)
class Line:
    """A line that is not blank.

    Attributes:
        number: Its place in the file, from 1.
        raw: Its bytes, cut to a little more than `MAX_LINE_BYTES`.
        too_long: Whether that was needed.
    """

    number: int
    raw: bytes
    too_long: bool = False

    @property
    def tag(self) -> str:
        """Names the line by its place and content, so that an edited input is noticed on resuming."""
        return blake2b(b"%d\n%b" % (self.number, self.raw), digest_size=12).hexdigest()


def opened(path: Path) -> BufferedReader:
    """Open a batch file.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return path.open("rb")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def read_lines(source: BufferedReader, path: Path) -> Iterator[Line]:
    """The lines of an open file, which is named for messages.

    Raises:
        UsageError: it is UTF-16.
        Step35Error: the disk fails.
    """
    number = 0
    try:
        while raw := source.readline(MAX_LINE_BYTES + 1):
            number += 1
            rest = raw
            while len(raw) > MAX_LINE_BYTES and rest and not rest.endswith(b"\n"):
                rest = source.readline(1 << 20)
            if number == 1 and raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise UsageError(f"{path} is encoded as UTF-16", "Save it as UTF-8.")
            if content := raw.removeprefix(b"\xef\xbb\xbf").strip(b" \t\r\n"):
                yield Line(number, content, len(raw) > MAX_LINE_BYTES)
    except OSError as error:
        raise Step35Error(f"reading {path} failed after line {number}: {error.strerror}") from None


def answered(answer: Answer, line: Line) -> dict[str, Any]:
    """The output line: an answer or, where the line itself is off, the error.

    Args:
        answer: Makes the response's body of a request and a tag for its ids. What it raises as UsageError,
            UnsupportedError or DoesNotFitError is the line's fault; anything else is raised.
        line: The input line.
    """
    custom_id: str | None = None
    try:
        raw = _decode(line)
        custom_id = _custom_id(raw, line.number)
        return _record(line, custom_id, 200, answer(_request(raw), line.tag), None)
    except (UsageError, UnsupportedError, DoesNotFitError) as error:
        return refused(line, custom_id, error.message)


def request_of(line: Line) -> Request:
    """The request of a line.

    Raises:
        UsageError: it is none.
    """
    return _request(_decode(line))


def refused(line: Line, custom_id: str | None, message: str) -> dict[str, Any]:
    """The output line that says what is wrong with the input line."""
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
    return _record(line, custom_id, 400, body, {"code": "invalid_request", "message": message})


def record_id(line: Line) -> str:
    """The `id` of the output line."""
    return f"batch_req_{line.tag}"


def _record(
    line: Line, custom_id: str | None, status: int, body: dict[str, Any], failure: dict[str, str] | None
) -> dict[str, Any]:
    return {
        "id": record_id(line),
        "custom_id": custom_id,
        "response": {"status_code": status, "request_id": f"req_{line.tag}", "body": body},
        "error": failure,
    }


def _decode(line: Line) -> dict[str, Any]:
    if line.too_long:
        raise UsageError(f"line {line.number} is longer than {MAX_LINE_BYTES} bytes")
    try:
        raw = from_json(line.raw, allow_inf_nan=False)
    except ValueError as error:
        raise UsageError(f"line {line.number} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise UsageError(f"line {line.number} is not a JSON object")
    return raw


def _request(raw: dict[str, Any]) -> Request:
    try:
        return Request.model_validate(raw)
    except ValidationError as error:
        raise explain(error) from None


def _custom_id(raw: dict[str, Any], number: int) -> str:
    custom_id = raw.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise UsageError(f"line {number} has no custom_id that is a text")
    return custom_id
