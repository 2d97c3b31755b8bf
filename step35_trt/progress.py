"""How long work says how far it is."""

from __future__ import annotations

from collections.abc import Callable

# Called with how much is done, of how much in all (bytes or things), and what came last.
Progress = Callable[[int, int, str], None]


def silent(done: int, total: int, name: str) -> None:
    """For those who do not ask."""
