"""What a model is calibrated on: a file of the user's, or what every Python installation carries."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from step35_trt.errors import UsageError
from step35_trt.nano.corpus import conversations, training_documents

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from step35_trt.runtime.dialogue.text import Text

LENGTH = 512  # tokens of a sequence
PIECE = 16  # characters that surely hold a token's share of ordinary text
FIELDS = ("text", "content", "prompt")  # of a JSON line; the first that is there


def calibration_tokens(
    text: Text, file: Path | None, tokens: int, length: int = LENGTH, own: Iterable[str] | None = None
) -> NDArray[np.int64]:
    """Sequences for a calibration, spread evenly over the text.

    Args:
        text: The checkpoint's tokenizer.
        file: Plain text, or JSON lines (`*.jsonl`) that are strings, or objects with `text`, `content`,
            `prompt`, or `messages` as in a chat; None: nano's training text. nano's held-out documents are
            in neither part of it, so that they can judge the result.
        tokens: How many, rounded up to whole sequences; fewer where the text has fewer.
        length: Tokens of a sequence; a text shorter than that is one shorter sequence.
        own: Documents in the place of nano's training text.

    Returns:
        `[sequences, length]`, each beginning with the bos id where the tokenizer has one.

    Raises:
        UsageError: the file cannot be read as text, or has too little of it.
    """
    source = "\n\n".join(_documents(file) if file else _default() if own is None else own)
    pieces = _pieces(text, source, -(-tokens // length), length)
    if pieces is not None:
        return pieces
    ids = _plain(text, source)
    if len(ids) < 2:
        raise UsageError(
            f"{file} holds no text to calibrate on", "Give a text or JSONL file with some pages."
        )
    body = length - (text.bos_id is not None)
    body = min(body, len(ids))
    count = min(-(-tokens // length), len(ids) // body)
    starts = np.linspace(0, len(ids) - body, count).astype(int)
    return _begun(text, [ids[start : start + body] for start in starts])


def _pieces(text: Text, source: str, count: int, length: int) -> NDArray[np.int64] | None:
    """Sequences from as many places of a long text, without encoding all of it; None where it is short."""
    span = PIECE * length
    if len(source) < 2 * count * span:
        return None
    rows = []
    for start in np.linspace(0, len(source) - 2 * span, count).astype(int):
        line = source.find("\n", start, start + span) + 1
        first = line or int(start)
        rows.append(_plain(text, source[first : first + span])[: length - (text.bos_id is not None)])
    return _begun(text, rows) if len({len(row) for row in rows}) == 1 else None


def _plain(text: Text, source: str) -> list[int]:
    """Ids without the one a prompt begins with."""
    ids = text.encode(source)
    return ids if text.bos_id is None else ids[1:]


def _begun(text: Text, rows: list[list[int]]) -> NDArray[np.int64]:
    begin = [] if text.bos_id is None else [text.bos_id]
    return np.array([begin + row for row in rows], dtype=np.int64)


def _default() -> Iterator[str]:
    for document in training_documents():
        yield document.text
    yield from conversations()


def _documents(file: Path) -> Iterator[str]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}") from None
    try:
        source = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{file} is not UTF-8 text (byte {error.start} is {content[error.start]:#04x})",
            "Convert it to UTF-8, for instance with iconv.",
        ) from None
    if "\0" in source:
        raise UsageError(f"{file} is a binary file, not text")
    if not source.strip():
        raise UsageError(f"{file} is empty", "Give a text or JSONL file with some pages.")
    if file.suffix not in (".jsonl", ".ndjson"):
        yield source
        return
    for number, line in enumerate(source.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            raise UsageError(f"{file}, line {number}, is not JSON") from None
        found = _text_of(entry)
        if found is None:
            raise UsageError(
                f"{file}, line {number}, has no text",
                f"A line is a string or an object with {', '.join(FIELDS)} or messages.",
            )
        yield found


def _text_of(entry: Any) -> str | None:
    if isinstance(entry, str):
        return entry
    if not isinstance(entry, dict):
        return None
    if isinstance(body := entry.get("body"), dict):  # a line of a batch
        entry = body
    for field in FIELDS:
        if isinstance(entry.get(field), str):
            return str(entry[field])
    messages = entry.get("messages")
    if not isinstance(messages, list):
        return None
    parts = [m["content"] for m in messages if isinstance(m, dict) and isinstance(m.get("content"), str)]
    return "\n\n".join(parts) or None
