"""Pages by counting alone: windows never lack one, lines name every page, memory is what was said."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from step35_trt.config import Step35Config
from step35_trt.errors import DoesNotFitError
from step35_trt.runtime.cache import cache_extent
from step35_trt.runtime.cache.cache_extent import CacheLayout, Extent, page_rows
from step35_trt.runtime.cache.page_account import Growth, PageAccount
from step35_trt.runtime.device.device_pages import DevicePages
from step35_trt.runtime.session import MOST_REJECTED
from tests.synthetic import raw_config

if TYPE_CHECKING:
    from collections.abc import Sequence

    from step35_trt.config import LayerSpec
    from step35_trt.runtime.cache.kv_rows import CachedRows


def graphs(window: int = 8) -> list[Sequence[LayerSpec]]:
    config = Step35Config.parse(raw_config(layers=5, modules=2, sliding_window=window))
    return [config.layers, *((layer,) for layer in config.mtp_layers)]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_within_the_capacity_nothing_fails(data: st.DataObject) -> None:
    """Of random steps of random sequences; a sequence's lines say where all its visible rows are."""
    page = data.draw(st.sampled_from([1, 4, 16]), "page")
    extent = Extent(
        slots=data.draw(st.integers(1, 4), "slots"),
        rows=data.draw(st.integers(1, 120), "rows"),
        call=data.draw(st.integers(1, 40), "call"),
        cached=data.draw(st.one_of(st.none(), st.integers(1, 400)), "cached"),
        page=page,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_extent, "idle_pages", lambda *_: 0)
        account = PageAccount(CacheLayout.of(graphs(data.draw(st.integers(1, 30), "window")), extent))
    entries = np.full(sum(extent.slots * spec.width for spec in account.layout.tables), -1)
    running: dict[int, list[CachedRows]] = {}
    for _ in range(data.draw(st.integers(1, 40))):
        graph = data.draw(st.integers(0, 2), "graph")
        growths, tokens, pages = [], extent.call, account.free_rows // page
        for slot in range(extent.slots):
            if slot not in running:
                running[slot] = [account.rows(g) for g in range(3)]
            held = running[slot]
            before = held[graph - 1].length if graph else extent.rows
            size = data.draw(st.integers(0, max(0, min(tokens, before - held[graph].length))))
            if not graph:
                room = (pages - -held[0].length // page) * page - held[0].length
                size = min(size, room)
                pages -= -(-(held[0].length + size) // page) - -(-held[0].length // page)
            if size > 0:
                growths.append(Growth(slot, held[graph], size))
                tokens -= size
        for place, named in account.grow(growths):
            entries[place] = named
        account.told(growths)
        for growth in growths:
            growth.rows.append(range(growth.tokens))
            check_lines(account, entries, growth.slot, growth.rows)
            growth.rows.drop()
            back = data.draw(st.integers(0, min(growth.tokens, MOST_REJECTED)))
            growth.rows.truncate(growth.rows.length - back)
        ended = data.draw(st.integers(0, 2 * extent.slots))
        for rows in running.pop(ended, []):
            rows.close()
        for spec in account.layout.tables:
            held_pages = [
                int(table.entries[place])
                for rows in running.values()
                for table in rows[spec.graph].tables
                if table.name == spec.name
                for place in range(table.first, table.count)
            ]
            assert len(set(held_pages)) == len(held_pages) == account.pools[spec.name].held


def check_lines(account: PageAccount, entries: np.ndarray, slot: int, rows: CachedRows) -> None:
    for table in rows.tables:
        spec = next(spec for spec in account.layout.tables if spec.name == table.name)
        for page in range(table.first, table.count):
            place = spec.first + slot * spec.width + page % spec.width
            assert entries[place] == table.entries[page]


def test_a_step_that_is_too_long_takes_nothing() -> None:
    extent = Extent(slots=1, rows=64, call=8, page=4)
    account = PageAccount(CacheLayout.of(graphs(), extent))
    rows = account.rows(0)
    with pytest.raises(DoesNotFitError, match="9 tokens, where 8"):
        account.grow([Growth(0, rows, 9)])
    taken = [Growth(0, rows, 8)]
    assert len(account.grow(taken)) == 4  # two pages in each table
    assert len(account.grow(taken)) == 4  # nobody was told
    account.told(taken)
    assert not len(account.grow(taken))
    account.take_back(taken)
    assert not any(pool.held for pool in account.pools.values())


def test_pages_and_lines_of_the_real_model() -> None:
    """128 rows a page, 512 of window: 4 whole pages, begun and ended in the middle of one."""
    assert page_rows() == 128
    extent = Extent(slots=8, rows=65536, call=2048)
    assert extent.pages(0) == 8 * 512
    assert extent.width(0) == 512
    assert replace(extent, cached=1000).pages(0) == 8
    # A sequence keeps 519 rows in 6 pages at most, and 2,048 tokens of one step are 16 more.
    assert extent.width(512) == 21 + 1
    assert extent.pages(512) == 2 * 8 + (8 * 517 + 2048) // 128 + 8 * 5
    assert replace(extent, rows=256, slots=1).pages(512) == 2 + 8 * 5
    assert replace(extent, rows=256).width(512) == 2


def test_memory_is_what_was_said() -> None:
    extent = Extent(slots=3, rows=70, call=24, cached=100, page=16)
    pages = DevicePages.of(graphs(), extent, torch.bfloat16, torch.device("cpu"))
    layers = [layer for each in graphs() for layer in each]
    taken = sum(x.nbytes for kept in (pages.keys, pages.values) for x in kept.values())
    assert taken == extent.nbytes(layers, 2)
    full = next(layer for layer in layers if not layer.window)
    assert extent.nbytes([full], 2) == 2 * 7 * 16 * 16 * 2


def test_slots_without_moves_are_apart() -> None:
    """What is timed without a session reads and writes pages of its own."""
    pages = DevicePages.of(graphs(), Extent(slots=3, rows=70, call=24), torch.float32, torch.device("cpu"))
    for spec in pages.layout.tables:
        lines = pages.lines(spec, torch.arange(3))
        assert len(lines.unique()) == lines.numel()
    spec = pages.layout.tables[1]
    pages.move(np.array([[spec.first + spec.width, 7], [spec.first, 5]]))
    assert pages.lines(spec, torch.tensor([1, 0]))[:, 0].tolist() == [7, 5]
