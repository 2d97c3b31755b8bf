"""What several commands take."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any, Literal

import rich_click as click

from step35_trt.errors import UsageError


class _Place(click.Path):
    """A file or directory with a name, so that what is not finished can lie beside it."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See `click.ParamType`; `.` and `..` get the names that they stand for."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if not value or not Path(os.path.abspath(path)).name:
            self.fail(f"{value!r} names no file or directory", param, ctx)
        return path if path.name not in ("", "..") else Path(os.path.abspath(path))


class _Positive(click.FloatRange):
    """A number from 0 up that one can reckon with."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """See `click.ParamType`."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


PATH = _Place()
AMOUNT = _Positive(min=0)
SHARE = _Positive(min=0, min_open=True)
AT_ONCE = click.IntRange(min=1, max=4096)  # each takes threads and memory before anything is known of it
SHOWN = 40  # characters of a mistake that are quoted


def token_ids(text: str) -> list[int]:
    """Ids separated by commas.

    Raises:
        UsageError: something else.
    """
    ids = whole_numbers(text)
    if not ids:
        raise UsageError(f"{shortened(text)} is not a list of token ids such as 1,2,3")
    return ids


def whole_numbers(text: str) -> list[int]:
    """Numbers of an int64 separated by commas; none where one of them is something else."""
    # int() alone would take underscores and the digits of every script.
    parts = [part.strip(" ") for part in text.split(",")]
    return [int(part) for part in parts] if all(re.fullmatch("-?[0-9]{1,18}", part) for part in parts) else []


def draft_tokens(text: str) -> int | Literal["auto"]:
    """The value of `--draft-tokens`.

    Raises:
        UsageError: it is neither a number nor 'auto'.
    """
    if text == "auto":
        return "auto"
    if not re.fullmatch("[0-9]{1,4}", text):
        raise UsageError(f"--draft-tokens takes 0, 1, 2, 3 or auto, not {shortened(text)}")
    return int(text)


def shortened(text: str) -> str:
    """A mistake in quotes, cut where nobody reads on."""
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}…")
