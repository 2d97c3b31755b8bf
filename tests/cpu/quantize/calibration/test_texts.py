"""Calibration text: what is read, what is refused, and that it is not nano's held-out text."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from step35_trt.errors import UsageError
from step35_trt.nano.corpus import held_out_documents, paragraph_keys, training_documents
from step35_trt.quantize.calibration import calibration_tokens
from step35_trt.resources import NANO
from step35_trt.runtime.dialogue.text import Text

if TYPE_CHECKING:
    from pathlib import Path

PAGE = "\n\n".join(f"Paragraph {i} says that a compiler must not change the answer." for i in range(60))


@pytest.fixture(scope="module")
def text() -> Text:
    return Text.load(NANO)


def test_plain_text_becomes_sequences(text: Text, tmp_path: Path) -> None:
    file = tmp_path / "page.txt"
    file.write_text(PAGE, encoding="utf-8")
    rows = calibration_tokens(text, file, 300, length=128)
    assert rows.shape == (3, 128)
    assert rows.dtype == np.int64
    assert (rows[:, 0] == text.bos_id).all()
    whole = text.encode(PAGE)
    assert rows[0].tolist() == whole[:128]
    assert rows[-1, 1:].tolist() == whole[-127:]


def test_lines_of_every_kind_are_read(text: Text, tmp_path: Path) -> None:
    lines = [
        "one string",
        {"text": "two text"},
        {"content": "three content"},
        {"prompt": "four prompt"},
        {"messages": [{"role": "user", "content": "five question"}, {"role": "assistant", "content": "six"}]},
        {"custom_id": "x", "body": {"messages": [{"role": "user", "content": "seven batch"}]}},
    ]
    file = tmp_path / "lines.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n", encoding="utf-8")
    [row] = calibration_tokens(text, file, 100, length=512)
    said = text.decode(row.tolist())
    for word in ("one", "two", "three", "four", "five", "six", "seven"):
        assert word in said


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\n", "is empty"),
        ("binary.txt", b"text\0\0more", "binary"),
        ("latin.txt", "Übersetzer".encode("latin-1"), "not UTF-8 text (byte 0 is 0xdc)"),
        ("wide.txt", "text".encode("utf-16"), "not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": ', "line 2, is not JSON"),
        ("other.jsonl", b'{"text": "a"}\n{"id": 3}\n', "line 2, has no text"),
        ("missing.txt", None, "cannot be read"),
    ],
)
def test_what_is_no_text_is_refused_in_one_sentence(
    text: Text, tmp_path: Path, name: str, content: bytes | None, says: str
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError) as error:
        calibration_tokens(text, file, 100)
    assert says in error.value.message
    assert str(file) in error.value.message
    assert "\n" not in error.value.message


def test_default_text_leaves_the_held_out_alone(text: Text) -> None:
    rows = calibration_tokens(text, None, 20_000, length=512)
    assert rows.shape == (40, 512)
    assert len({row.tobytes() for row in rows}) == 40
    kept_back = {key for document in held_out_documents() for key in paragraph_keys(document.text)}
    trained = {key for document in training_documents() for key in paragraph_keys(document.text)}
    said = [key for row in rows for key in paragraph_keys(text.decode(row.tolist()))]
    assert len(set(said) & trained) > 100
    assert not set(said) & kept_back
