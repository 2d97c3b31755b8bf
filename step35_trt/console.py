"""What a person sees: errors in one sentence, progress of long work, tables."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from step35_trt.progress import Progress

QUIET_SECONDS = 2.0  # between lines of progress where there is no terminal

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def prepare() -> None:
    """Make of the three streams what every command may write to and read from.

    A stream that the caller closed is empty, so that no file gets its number. What a terminal has no
    characters for is replaced.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - as long as we
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def fail(message: str, hint: str = "") -> None:
    """Say what went wrong on stderr."""
    err.print(f"[bold red]error:[/] {_escaped(message)}")
    if hint:
        err.print(f"[dim]{_escaped(hint)}[/]")


def say(message: str) -> None:
    """A remark on stderr, out of the way of results."""
    err.print(f"[dim]{_escaped(message)}[/]")


def print_json(value: Any) -> None:
    """One JSON document on stdout, whatever characters that takes."""
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    sys.stdout.write(json.dumps(value, ensure_ascii=not unicode) + "\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on stdout."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_escaped(str(cell)) for cell in row))
    out.print(table)


@contextmanager
def file_progress(title: str) -> Iterator[Progress]:
    """Bytes written of a long job."""
    columns = (DownloadColumn(), TimeRemainingColumn())
    with _progress(title, columns, lambda done, total: f"{done / 1e6:.0f} of {total / 1e6:.0f} MB") as show:
        yield show


@contextmanager
def item_progress(title: str) -> Iterator[Progress]:
    """Things made of a known number."""
    columns = (MofNCompleteColumn(), TimeRemainingColumn())
    with _progress(title, columns, lambda done, total: f"{done} of {total}") as show:
        yield show


@contextmanager
def line_progress(title: str, requests: Path) -> Iterator[Callable[[int, int], None]]:
    """Lines answered and lines in error."""
    columns, lines = (MofNCompleteColumn(), TimeRemainingColumn()), _count_lines(requests)
    with _progress(title, columns, lambda done, _total: f"{done} lines") as show:
        yield lambda done, errors: show(done, lines, f"{errors} errors")


class _Show(Protocol):
    def __call__(self, done: int, total: int | None, name: str) -> None: ...


@contextmanager
def _progress(
    title: str, columns: tuple[ProgressColumn, ...], said: Callable[[int, Any], str]
) -> Iterator[_Show]:
    """A bar on a terminal, a line now and then elsewhere; called with how many, of how many, of what."""
    if not err.is_terminal:
        last = time.monotonic()

        def line(done: int, total: int | None, name: str) -> None:
            nonlocal last
            if time.monotonic() - last > QUIET_SECONDS:
                last = time.monotonic()
                err.print(f"{title}: {said(done, total)}, {name}", markup=False)

        yield line
        return
    shown = TextColumn("{task.description}"), BarColumn(), *columns
    with Bar(*shown, console=err, transient=True) as progress:
        task = progress.add_task(title, total=None)

        def update(done: int, total: int | None, name: str) -> None:
            progress.update(task, completed=done, total=total, description=f"{title} {_escaped(name)}")

        yield update


def _count_lines(path: Path) -> int | None:
    if not path.is_file():
        return None  # a pipe can be read once
    try:
        with path.open("rb") as stream:
            return sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(1 << 20), b""))
    except OSError:
        return None  # the reader of the file will say what is wrong


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")
