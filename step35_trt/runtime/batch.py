"""OpenAI's batch files: one request a line in, one answer a line out, in order, across interruptions."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from step35_trt.errors import DoesNotFitError, Step35Error, UnsupportedError, UsageError
from step35_trt.runtime import completions
from step35_trt.runtime.batch_output import Recorded, ResumableOutput
from step35_trt.runtime.chat import ChatTemplate, explain
from step35_trt.runtime.depth import DepthController, fixed_depth

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from io import BufferedReader
    from pathlib import Path

    from step35_trt.runtime.depth import DraftTokens
    from step35_trt.runtime.session import Session
    from step35_trt.runtime.text import Text

    Answer = Callable[["Request", str], dict[str, Any]]
    Progress = Callable[["BatchSummary"], None]

MAX_LINE_BYTES = 32 << 20  # many times the longest context, escaped as badly as can be


class Request(BaseModel):
    """One line of the input; other keys than these do not concern the answer."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)
    custom_id: str = Field(min_length=1)
    method: Literal["POST"] = "POST"
    url: Literal["/v1/chat/completions", "/v1/completions"] | None = None
    body: dict[str, Any]


@dataclass(frozen=True)
class BatchSummary:
    """What a batch came to, lines of earlier runs included.

    Attributes:
        lines: Input lines, blank ones left out.
        answered: Lines with an answer.
        errors: Lines with an error.
        prompt_tokens: Tokens of the answered requests.
        generated_tokens: Tokens of the answers.
        seconds: Duration of this run.
        resumed: Lines that an earlier run had written.
        already_finished: Whether there was nothing to do.
    """

    lines: int = 0
    answered: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    resumed: int = 0
    already_finished: bool = False


@dataclass(frozen=True)
class _Line:
    number: int
    raw: bytes
    too_long: bool

    @property
    def tag(self) -> str:
        """Names the line by its place and content, so that an edited input is noticed on resuming."""
        return blake2b(b"%d\n%b" % (self.number, self.raw), digest_size=12).hexdigest()


def run_batch(
    session: Session,
    text: Text,
    input_path: Path,
    output_path: Path,
    *,
    draft_tokens: DraftTokens = "auto",
    progress: Progress | None = None,
) -> BatchSummary:
    """Answer a batch file with a bundle.

    Args:
        session: The loaded bundle.
        text: Its tokenizer.
        input_path: JSON lines in OpenAI's batch format.
        output_path: Written under the name with `.partial` added until it is complete. A partial file is
            continued, a complete one checked and left alone.
        draft_tokens: Drafts per round, see `generate`.
        progress: Called after every line.

    Raises:
        UsageError: a path or `draft_tokens` is off, or the output holds the answers of another input.
        DoesNotFitError: the disk is full.
        CorruptInputError: the chat template is not valid Jinja.
    """
    heads = session.config.num_nextn_predict_layers
    fixed_depth(draft_tokens, heads)  # else every line would say so
    # What drafting learns of one line serves the next.
    drafts = DepthController(heads) if draft_tokens == "auto" else draft_tokens
    template = None if text.chat_template is None else ChatTemplate.of(text)

    def answer(request: Request, tag: str) -> dict[str, Any]:
        body = completions.parse_body(request.body)
        if request.url is not None and (request.url == "/v1/completions") != (body.messages is None):
            raise UsageError(f"url {request.url} does not go with a body that has {_input(body)}")
        return completions.answer(session, text, template, body, tag, draft_tokens=drafts)

    return answer_lines(answer, input_path, output_path, progress=progress)


def answer_lines(
    answer: Answer, input_path: Path, output_path: Path, *, progress: Progress | None = None
) -> BatchSummary:
    """`run_batch` with anything that answers.

    Args:
        answer: Makes the response's body of a request and a tag for its ids. What it raises as UsageError,
            UnsupportedError or DoesNotFitError is the line's fault and becomes its answer.
        input_path: See `run_batch`.
        output_path: See `run_batch`.
        progress: Called after every line.

    Raises:
        UsageError: a path is off, or the output holds the answers of another input.
        DoesNotFitError: the disk is full.
    """
    started = time.monotonic()
    _check_paths(input_path, output_path)
    seen: set[bytes] = set()
    with _opened(input_path) as source, ResumableOutput(output_path) as output:
        summary = BatchSummary(already_finished=output.finished)
        holder = output.path if output.finished else output.partial
        recorded = output.recorded()
        for line in _read(source, input_path):
            earlier = next(recorded, None)
            if earlier is None and output.finished:
                raise _foreign(holder, f"ends before line {line.number} of {input_path}")
            if earlier is not None and earlier.id != f"batch_req_{line.tag}":
                raise _foreign(holder, f"does not answer line {line.number} of {input_path} as it is now")
            if earlier is None:
                record = _record(answer, line, seen)
                output.append(record)
                earlier = Recorded.model_validate(record)
            else:
                summary = replace(summary, resumed=summary.resumed + 1)
            if earlier.custom_id is not None:
                seen.add(_digest(earlier.custom_id))
            summary = _add(summary, earlier, time.monotonic() - started)
            if progress is not None:
                progress(summary)
        if next(recorded, None) is not None:
            raise _foreign(holder, f"has more answers than {input_path} has lines")
        output.finish()
    return replace(summary, seconds=time.monotonic() - started)


def _check_paths(input_path: Path, output_path: Path) -> None:
    if not output_path.parent.is_dir():
        raise UsageError(f"the folder {output_path.parent} does not exist")
    if output_path.is_dir():
        raise UsageError(f"{output_path} is a folder")
    partial = output_path.with_name(output_path.name + ".partial")
    if input_path.resolve() in (output_path.resolve(), partial.resolve()):
        raise UsageError(f"{input_path} cannot be both input and output")


def _opened(path: Path) -> BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def _read(source: BufferedReader, path: Path) -> Iterator[_Line]:
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
                yield _Line(number, content, len(raw) > MAX_LINE_BYTES)
    except OSError as error:
        raise Step35Error(f"reading {path} failed after line {number}: {error.strerror}") from None


def _record(answer: Answer, line: _Line, seen: set[bytes]) -> dict[str, Any]:
    """The output line: an answer or, in its place, the error."""
    custom_id, status, failure = None, 200, None
    try:
        if line.too_long:
            raise UsageError(f"line {line.number} is longer than {MAX_LINE_BYTES} bytes")
        raw = _decode(line)
        custom_id = _custom_id(raw, line.number)
        if _digest(custom_id) in seen:
            raise UsageError(f"an earlier line has the custom_id {custom_id!r} already")
        try:
            request = Request.model_validate(raw)
        except ValidationError as error:
            raise explain(error) from None
        body = answer(request, line.tag)
    except (UsageError, UnsupportedError, DoesNotFitError) as error:
        status, failure = 400, {"code": "invalid_request", "message": error.message}
        body = {
            "error": {"message": error.message, "type": "invalid_request_error", "param": None, "code": None}
        }
    return {
        "id": f"batch_req_{line.tag}",
        "custom_id": custom_id,
        "response": {"status_code": status, "request_id": f"req_{line.tag}", "body": body},
        "error": failure,
    }


def _decode(line: _Line) -> dict[str, Any]:
    try:
        raw = from_json(line.raw, allow_inf_nan=False)
    except ValueError as error:
        raise UsageError(f"line {line.number} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise UsageError(f"line {line.number} is not a JSON object")
    return raw


def _custom_id(raw: dict[str, Any], number: int) -> str:
    custom_id = raw.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise UsageError(f"line {number} has no custom_id that is a text")
    return custom_id


def _digest(custom_id: str) -> bytes:
    """Stands for an id in the set of those seen, whose size then does not hang on what people use as ids."""
    return blake2b(custom_id.encode(), digest_size=16).digest()


def _add(summary: BatchSummary, record: Recorded, seconds: float) -> BatchSummary:
    prompt_tokens, generated_tokens = record.usage
    return replace(
        summary,
        lines=summary.lines + 1,
        answered=summary.answered + (not record.failed),
        errors=summary.errors + record.failed,
        prompt_tokens=summary.prompt_tokens + prompt_tokens,
        generated_tokens=summary.generated_tokens + generated_tokens,
        seconds=seconds,
    )


def _foreign(path: Path, what: str) -> Step35Error:
    return UsageError(f"{path} {what}", "Choose another output, or move that file away to start afresh.")


def _input(body: completions.Body) -> str:
    return "a prompt" if body.messages is None else "messages"
