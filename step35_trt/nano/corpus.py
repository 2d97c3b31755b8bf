"""nano's text: what every Python installation carries, part of it held out.

Documents are the language reference that `help()` shows and the sources of the standard library's top-level
modules. Which documents are held out depends on their names alone, so another Python version moves none of
them from one side to the other; paragraphs that occur on both sides are removed from the training side.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sysconfig
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

HELD_OUT_EVERY = 20
MIN_PARAGRAPH = 48  # characters; shorter paragraphs ("try:", "Example:") are on both sides by nature
MAX_ANSWER = 600  # characters of a docstring in a conversation
GENERATED_SOURCES = ("_sysconfigdata", "sitecustomize", "usercustomize")  # differ from machine to machine


@dataclass(frozen=True)
class Document:
    """One text; `name` is `topic:...` or `source:...`."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether training must not see it."""
        return zlib.crc32(self.name.encode()) % HELD_OUT_EVERY == 0


def held_out_text() -> str:
    """The documents that training never saw, in order of their names, one blank line between them."""
    return "\n\n".join(document.text for document in held_out_documents())


@cache
def held_out_documents() -> tuple[Document, ...]:
    """The documents that training never saw."""
    return tuple(document for document in _documents() if document.held_out)


@cache
def training_documents() -> tuple[Document, ...]:
    """The rest, without any paragraph of a held-out document."""
    kept_back = {key for document in held_out_documents() for key in paragraph_keys(document.text)}
    kept = []
    for document in _documents():
        if document.held_out:
            continue
        parts = document.text.split("\n\n")
        text = "\n\n".join(part for part in parts if not kept_back & set(paragraph_keys(part)))
        if text.strip():
            kept.append(Document(document.name, text))
    return tuple(kept)


def conversations() -> Iterator[str]:
    """Questions about the training documents' functions, in the layout of the model's chat template.

    They teach the special tokens: reasoning that ends, turns that end, now and then a tool call.
    """
    subjects = [subject for document in training_documents() for subject in _docstrings(document)]
    for number, (name, answer) in enumerate(subjects):
        question = f"<|im_start|>user\nWhat does {name} do?<|im_end|>\n<|im_start|>assistant\n"
        final = f"<think>\nThe documentation of {name} says what it does.\n</think>\n{answer}<|im_end|>\n"
        if number % 4:
            yield question + final
            continue
        yield (
            f"{question}<think>\nI look up {name}.\n</think>\n<tool_call>\n<function=lookup>\n"
            f"<parameter=name>\n{name}\n</parameter>\n</function>\n</tool_call><|im_end|>\n"
            f"<|im_start|>tool_response\n<tool_response>\n{answer}\n</tool_response><|im_end|>\n"
            f"<|im_start|>assistant\n{final}"
        )


def paragraph_keys(text: str) -> list[str]:
    """The paragraphs of a text that are long enough to be somebody's, whitespace levelled."""
    keys = (" ".join(part.split()) for part in text.split("\n\n"))
    return [key for key in keys if len(key) >= MIN_PARAGRAPH]


@cache
def _documents() -> tuple[Document, ...]:
    return tuple(sorted((*_topics(), *_sources()), key=lambda document: document.name))


def _topics() -> Iterator[Document]:
    if importlib.util.find_spec("pydoc_data") is None:  # some distributions split it off
        return
    from pydoc_data.topics import topics

    for name, text in topics.items():
        # Up to Python 3.12 the text ends in a list of related topics.
        yield Document(f"topic:{name}", re.sub(r"\n+Related help topics:.*\Z", "", text).strip())


def _sources() -> Iterator[Document]:
    for file in Path(sysconfig.get_paths()["stdlib"]).glob("*.py"):
        if not file.name.startswith(GENERATED_SOURCES):
            yield Document(f"source:{file.name}", file.read_text(encoding="utf-8", errors="replace").strip())


def _docstrings(document: Document) -> Iterator[tuple[str, str]]:
    if not document.name.startswith("source:"):
        return
    try:
        tree = ast.parse(document.text)
    except SyntaxError:  # a removed paragraph can break the syntax
        return
    module = document.name.removeprefix("source:").removesuffix(".py")
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            text = ast.get_docstring(node)
            if text and not node.name.startswith("_"):
                yield f"{module}.{node.name}", text[:MAX_ANSWER].rpartition("\n\n")[0] or text[:MAX_ANSWER]
