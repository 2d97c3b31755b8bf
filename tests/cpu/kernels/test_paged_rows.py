"""Pages are nobody's or one sequence's, and what a query may see stays where its table says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from step35_trt.dialects.paged_rows import PagedRows, PagePool

PAGE = 4


def pool(window: int) -> PagePool:
    return PagePool.of((1, PAGE, 2), torch.float32, torch.device("cpu"), window)


class Sequence:
    """Rows, and the number that was written at each position."""

    def __init__(self, rows: PagedRows) -> None:
        self.rows, self.written, self.latest = rows, [], 0


def write(pages: PagePool, sequences: list[Sequence], news: list[int], counter: list[int]) -> None:
    """What a call does: room, then a row for each new position, then reading of what queries see."""
    for sequence, new in zip(sequences, news, strict=True):
        sequence.rows.reserve(len(sequence.written), new)
        sequence.latest = new
    cache = pages.cache([sequence.rows for sequence in sequences])
    width = cache.table.shape[1]

    def slot(s: int, position: int) -> torch.Tensor:
        return cache.keys[cache.table[s, position // PAGE % width], 0, position % PAGE]

    for s, (sequence, new) in enumerate(zip(sequences, news, strict=True)):
        for _ in range(new):
            counter[0] += 1
            slot(s, len(sequence.written))[:] = counter[0]
            sequence.written.append(counter[0])
    for s, (sequence, new) in enumerate(zip(sequences, news, strict=True)):
        past = len(sequence.written) - new
        first = max(0, past - pages.window + 1) if pages.window else 0
        for position in range(first, len(sequence.written)):
            assert slot(s, position)[0] == sequence.written[position]


@settings(max_examples=25, deadline=None)
@given(st.data(), st.sampled_from([0, 1, 5, 8]))
def test_what_is_visible_stays_and_no_page_has_two_holders(data: st.DataObject, window: int) -> None:
    pages, counter = pool(window), [0]
    sequences: list[Sequence] = []
    for _ in range(data.draw(st.integers(1, 12))):
        action = data.draw(st.sampled_from(["open", "close", "step", "step", "truncate"]))
        if action == "open":
            sequences.append(Sequence(pages.open()))
        elif action == "close" and sequences:
            del sequences[data.draw(st.integers(0, len(sequences) - 1))]
        elif action == "step" and sequences:
            news = [data.draw(st.integers(0, 11)) for _ in sequences]
            write(pages, sequences, news, counter)
        elif action == "truncate" and sequences:
            take_back(sequences[data.draw(st.integers(0, len(sequences) - 1))], data)
        held = pages.free + [page for sequence in sequences for page in sequence.rows.pages]
        assert sorted(held) == list(range(len(pages.keys)))


def take_back(sequence: Sequence, data: st.DataObject) -> None:
    """Rows of the latest call."""
    back = data.draw(st.integers(0, sequence.latest))
    sequence.latest -= back
    del sequence.written[len(sequence.written) - back :]
    sequence.rows.truncate(len(sequence.written))


def test_a_window_moves_on_and_what_it_left_cannot_be_returned_to() -> None:
    pages = pool(5)
    rows = pages.open()
    for past in range(0, 100, 5):
        rows.reserve(past, 5)
        assert len(rows.pages) <= 4
    with pytest.raises(ValueError, match="latest call"):
        rows.truncate(60)
    with pytest.raises(ValueError, match="given back"):
        rows.reserve(60, 1)
    rows.truncate(95)
    assert rows.pages


def test_without_a_window_any_length_can_be_returned_to() -> None:
    rows = pool(0).open()
    rows.reserve(0, 50)
    rows.truncate(3)
    assert len(rows.pages) == 1
    rows.reserve(3, 1)


def test_a_table_is_made_once_for_the_same_pages() -> None:
    pages = pool(0)
    rows = pages.open()
    rows.reserve(0, 2)
    first = pages.cache([rows]).table
    rows.reserve(2, 2)
    assert pages.cache([rows]).table is first
    rows.reserve(4, 1)
    assert pages.cache([rows]).table is not first
