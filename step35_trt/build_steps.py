"""What a build consists of: one file a step, written piece by piece."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from step35_trt.bundle import REPORTS, TOKENIZER
from step35_trt.runtime.dialogue.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from step35_trt.weight_file import WeightFile

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class BuildStep:
    """One file of the bundle: its size, 0 where that is not known, and how it is written, piece by piece."""

    file: str
    nbytes: int
    write: Callable[[Path], Iterator[int]]


@dataclass(frozen=True)
class Contents:
    """Every file of a bundle but the manifest and the tokenizer, before the first byte is written.

    Attributes:
        steps: In the order in which they are written.
        notes: The manifest's.
        unfinished: Files that are made on the target.
        expected_bytes: Disk that all files take, those made on the target included, where that is known.
        sentence: What is said before the build; empty where nothing is.
    """

    steps: tuple[BuildStep, ...]
    notes: tuple[str, ...]
    unfinished: tuple[str, ...] = ()
    expected_bytes: int = 0
    sentence: str = ""


def bytes_step(name: str, content: bytes) -> BuildStep:
    """A file whose content is there."""

    def write(path: Path) -> Iterator[int]:
        path.write_bytes(content)
        yield len(content)

    return BuildStep(name, len(content), write)


def made_step(name: str, make: Callable[[], bytes]) -> BuildStep:
    """A file whose content is made when it is its turn."""

    def write(path: Path) -> Iterator[int]:
        path.write_bytes(make())
        yield 0

    return BuildStep(name, 0, write)


def weights_step(file: WeightFile) -> BuildStep:
    """A packed file of weights."""

    def write(path: Path) -> Iterator[int]:
        with path.open("wb") as stream:
            yield from file.write(stream)

    return BuildStep(file.name, file.size, write)


def tokenizer_steps(checkpoint: Path) -> list[BuildStep]:
    """What a checkpoint has of a tokenizer.

    Raises:
        CorruptInputError: it is damaged, which is better said before the long part.
        UnsupportedError: it is not byte-level.
    """
    if (checkpoint / "tokenizer.json").is_file():
        Text.load(checkpoint)
    return [
        bytes_step(f"{TOKENIZER}/{name}", (checkpoint / name).read_bytes())
        for name in TOKENIZER_FILES
        if (checkpoint / name).is_file()
    ]


def report_steps(checkpoint: Path) -> list[BuildStep]:
    """What a quantised checkpoint has of reports."""
    files = sorted(path for path in (checkpoint / REPORTS).glob("*") if path.is_file())
    return [bytes_step(f"{REPORTS}/{path.name}", path.read_bytes()) for path in files]
