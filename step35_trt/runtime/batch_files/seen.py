"""Which ids have come before, for files with more lines than a set of them would leave memory for."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

FRESH = 1 << 16


class SeenIds:
    """Texts seen so far, 16 bytes for each.

    New digests gather in a set; full sets become sorted arrays, and arrays of like size are merged, so a
    look-up goes through few of them.
    """

    def __init__(self) -> None:
        self._fresh: set[bytes] = set()
        self._sorted: list[np.ndarray[tuple[int], np.dtype[np.bytes_]]] = []

    def add(self, text: str) -> bool:
        """Whether a text is new; it is not, from then on."""
        digest = blake2b(text.encode(), digest_size=16).digest()
        if digest in self._fresh or any(_holds(array, digest) for array in self._sorted):
            return False
        self._fresh.add(digest)
        if len(self._fresh) == FRESH:
            self._settle()
        return True

    def _settle(self) -> None:
        merged = np.sort(np.array(list(self._fresh), dtype="S16"))
        self._fresh.clear()
        while self._sorted and len(self._sorted[-1]) <= len(merged):
            merged = np.sort(np.concatenate([self._sorted.pop(), merged]), kind="stable")
        self._sorted.append(merged)


def _holds(array: np.ndarray[tuple[int], np.dtype[np.bytes_]], digest: bytes) -> bool:
    key = digest.rstrip(b"\0")  # as numpy gives it back; of digests of one length, none becomes another
    place = int(array.searchsorted(np.bytes_(key)))
    return place < len(array) and bytes(array[place]) == key
