"""What several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import rich_click as click

from step35_trt.errors import UsageError

PATH = click.Path(path_type=Path)


def token_ids(text: str) -> list[int]:
    """Ids separated by commas.

    Raises:
        UsageError: something else.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{text!r} is not a list of token ids such as 1,2,3") from None


def draft_tokens(text: str) -> int | Literal["auto"]:
    """The value of `--draft-tokens`.

    Raises:
        UsageError: it is neither a number nor 'auto'.
    """
    if text == "auto":
        return "auto"
    if not text.isdecimal():
        raise UsageError(f"--draft-tokens takes 0, 1, 2, 3 or auto, not {text!r}")
    return int(text)
