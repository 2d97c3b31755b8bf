"""A few threads that work ahead of a consumer."""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

T = TypeVar("T")
R = TypeVar("R")


def in_order(work: Callable[[T], R], items: Sequence[T], threads: int) -> Iterator[R]:
    """`map` on threads, holding no more results than threads; work should release the interpreter."""
    if len(items) == 1:  # nothing to do ahead
        yield work(items[0])
        return
    with ThreadPoolExecutor(threads) as pool:
        ahead = deque(pool.submit(work, item) for item in items[:threads])
        try:
            for item in items[threads:]:
                done = ahead.popleft()
                ahead.append(pool.submit(work, item))
                yield done.result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for unused in ahead:
                unused.cancel()
