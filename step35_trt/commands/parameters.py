"""What several commands take."""

from __future__ import annotations

from pathlib import Path

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
