"""Tables of text, shown alike by the terminal and by pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from step35_trt import console

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True)
class Table:
    """Rows of text under a title; the first column is words, the others figures. `note` explains signs."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def show(tables: Iterable[Table]) -> None:
    """Print tables on stdout, each with its note."""
    for table in tables:
        console.out.print()
        console.print_table(table.title, table.columns, table.rows)
        if table.note:
            console.out.print(table.note, markup=False, style="dim")


def several(count: int, noun: str) -> str:
    """A number of things."""
    return f"{count} {noun}" + ("" if count == 1 else "s")
