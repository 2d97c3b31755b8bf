"""Every error a user can meet: one sentence, one hint, one exit code."""

from __future__ import annotations

import errno

NO_ROOM = frozenset({errno.ENOSPC, errno.EFBIG, errno.EDQUOT})  # of an OSError: what making room mends


class Step35Error(Exception):
    """An expected failure.

    Args:
        message: One sentence that says what is wrong, naming the thing.
        hint: What to do about it; may be empty.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(Step35Error):
    """The call itself is off: an option, a path, a request field."""

    exit_code = 2


class UnsupportedError(Step35Error):
    """A model feature, target or machine this compiler does not know."""

    exit_code = 3


class DoesNotFitError(Step35Error):
    """Not enough disk, memory or context for what was asked."""

    exit_code = 4


class VerificationError(Step35Error):
    """A result differs from its reference."""

    exit_code = 5


class CorruptInputError(Step35Error):
    """A checkpoint or bundle is damaged, incomplete or contradicts itself."""

    exit_code = 6


class RankLostError(Step35Error):
    """A process of those that run a model together has ended, or does not answer."""
