"""OpenAI's batch files: one request a line in, one answer a line out, in order, across interruptions."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from step35_trt.errors import Step35Error, UsageError
from step35_trt.runtime.batch_files.batch_lines import (
    Line,
    Request,
    answered,
    opened,
    read_lines,
    record_id,
    refused,
)
from step35_trt.runtime.batch_files.batch_output import Recorded, ResumableOutput
from step35_trt.runtime.batch_files.seen import SeenIds
from step35_trt.runtime.decoding.depth import fixed_depth
from step35_trt.runtime.dialogue import completions
from step35_trt.runtime.dialogue.chat import ChatTemplate
from step35_trt.runtime.scheduling.requests import Limits
from step35_trt.runtime.scheduling.serving import ServingLoop
from step35_trt.runtime.scheduling.through_loop import complete_through

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from concurrent.futures import Future
    from pathlib import Path
    from typing import Literal

    from step35_trt.runtime.batch_files.batch_lines import Answer
    from step35_trt.runtime.dialogue.text import Text
    from step35_trt.runtime.session import Session

    Record = dict[str, Any]
    # Takes lines as it finds room, gives each with its record, in the same order.
    Answering = Callable[[Iterable[Line]], Iterator[tuple[Line, Record]]]
    Progress = Callable[["BatchSummary"], None]

AHEAD = 2  # lines taken for each that is answered at a time, so that a long one does not stop the others


@dataclass(frozen=True)
class BatchSummary:
    """What a batch came to, lines of earlier runs included.

    Attributes:
        lines: Input lines, blank ones left out.
        answered: Lines with an answer.
        errors: Lines with an error.
        prompt_tokens: Tokens of the answered requests.
        generated_tokens: Tokens of the answers.
        generated_now: How many of them this run made.
        seconds: Duration of this run.
        resumed: Lines that an earlier run had written.
        already_finished: Whether there was nothing to do.
    """

    lines: int = 0
    answered: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    generated_now: int = 0
    seconds: float = 0.0
    resumed: int = 0
    already_finished: bool = False

    @property
    def tokens_per_second(self) -> float:
        """Of this run."""
        return self.generated_now / self.seconds if self.seconds > 0 else 0.0


def run_batch(
    session: Session,
    text: Text,
    input_path: Path,
    output_path: Path,
    *,
    sequences: int = 16,
    draft_tokens: int | Literal["auto"] = "auto",
    progress: Progress | None = None,
) -> BatchSummary:
    """Answer a batch file with a bundle, several lines at a time.

    Args:
        session: The loaded bundle.
        text: Its tokenizer.
        input_path: JSON lines in OpenAI's batch format.
        output_path: Written under the name with `.partial` added until it is complete. A partial file is
            continued, a complete one checked and left alone.
        sequences: Lines that are answered at the same time.
        draft_tokens: Drafts per round, see `generate`.
        progress: Called after every line.

    Raises:
        UsageError: a path or `draft_tokens` is off, or the output holds the answers of another input.
        DoesNotFitError: the disk is full.
        CorruptInputError: the chat template is not valid Jinja.
    """
    with together(session, text, sequences, draft_tokens) as answering:
        return run_lines(answering, input_path, output_path, progress=progress)


@contextmanager
def together(
    session: Session, text: Text, sequences: int, draft_tokens: int | Literal["auto"]
) -> Iterator[Answering]:
    """Something that answers lines side by side, with a serving loop that ends with the context.

    Raises:
        UsageError: `draft_tokens` is off.
        CorruptInputError: the chat template is not valid Jinja.
    """
    fixed_depth(draft_tokens, session.config.num_nextn_predict_layers)  # else every line would say so
    template = None if text.chat_template is None else ChatTemplate.of(text)
    # In this order: the loop ends first, and with it whatever a thread waits for.
    with (
        ThreadPoolExecutor(AHEAD * sequences, "line") as threads,
        ServingLoop(session, Limits(sequences=sequences)) as loop,
    ):

        def answer(request: Request, tag: str) -> dict[str, Any]:
            body = completions.parse_body(request.body)
            if request.url is not None and (request.url == "/v1/completions") != (body.messages is None):
                raise UsageError(f"url {request.url} does not go with a body that has {_input(body)}")
            return completions.answer(
                session,
                text,
                template,
                body,
                tag,
                draft_tokens=draft_tokens,
                completing=partial(complete_through, loop),
            )

        def submit(line: Line) -> tuple[Line, Future[Record]]:
            return line, threads.submit(answered, answer, line)

        def answering(lines: Iterable[Line]) -> Iterator[tuple[Line, Record]]:
            source = iter(lines)
            pending = deque(submit(line) for line in islice(source, AHEAD * sequences))
            while pending:
                line, future = pending.popleft()
                record = future.result()
                pending.extend(submit(line) for line in islice(source, 1))
                yield line, record

        yield answering


def answer_lines(
    answer: Answer, input_path: Path, output_path: Path, *, progress: Progress | None = None
) -> BatchSummary:
    """`run_lines` with anything that answers one request; see `answered`."""

    def answering(lines: Iterable[Line]) -> Iterator[tuple[Line, Record]]:
        return ((line, answered(answer, line)) for line in lines)

    return run_lines(answering, input_path, output_path, progress=progress)


def run_lines(
    answering: Answering, input_path: Path, output_path: Path, *, progress: Progress | None = None
) -> BatchSummary:
    """`run_batch` with anything that answers lines.

    Args:
        answering: Given the lines that have no answer yet.
        input_path: See `run_batch`.
        output_path: See `run_batch`.
        progress: Called after every line.

    Raises:
        UsageError: a path is off, or the output holds the answers of another input.
        DoesNotFitError: the disk is full.
    """
    started = time.monotonic()
    _check_paths(input_path, output_path)
    seen = SeenIds()
    with opened(input_path) as source, ResumableOutput(output_path) as output:
        summary = BatchSummary(already_finished=output.finished)
        lines = read_lines(source, input_path)
        for earlier in _earlier(output, lines, input_path):
            if earlier.custom_id is not None:
                seen.add(earlier.custom_id)
            summary = _add(summary, earlier, time.monotonic() - started)
            summary = replace(summary, resumed=summary.resumed + 1)
            if progress is not None:
                progress(summary)
        if not output.finished:
            for line, answer in answering(lines):
                custom_id = answer["custom_id"]
                again = custom_id is not None and not seen.add(custom_id)
                message = f"an earlier line has the custom_id {custom_id!r} already"
                record = refused(line, custom_id, message) if again else answer
                output.append(record)
                new = Recorded.model_validate(record)
                summary = _add(summary, new, time.monotonic() - started)
                summary = replace(summary, generated_now=summary.generated_now + new.usage[1])
                if progress is not None:
                    progress(summary)
        output.finish()
    return replace(summary, seconds=time.monotonic() - started)


def _earlier(output: ResumableOutput, lines: Iterator[Line], input_path: Path) -> Iterator[Recorded]:
    """The records that are there, each checked against its line; takes so many of `lines`."""
    holder = output.path if output.finished else output.partial
    for earlier in output.recorded():
        line = next(lines, None)
        if line is None:
            raise _foreign(holder, f"has more answers than {input_path} has lines")
        if earlier.id != record_id(line):
            raise _foreign(holder, f"does not answer line {line.number} of {input_path} as it is now")
        yield earlier
    if output.finished and (line := next(lines, None)) is not None:
        raise _foreign(holder, f"ends before line {line.number} of {input_path}")


def _check_paths(input_path: Path, output_path: Path) -> None:
    if not output_path.parent.is_dir():
        raise UsageError(f"the folder {output_path.parent} does not exist")
    if output_path.exists() and not output_path.is_file():
        raise UsageError(f"{output_path} is no file", "Name a file: answers are written so that they resume.")
    unfinished = output_path.with_name(output_path.name + ".partial")
    if input_path.resolve() in (output_path.resolve(), unfinished.resolve()):
        raise UsageError(f"{input_path} cannot be both input and output")


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
