"""Pages: nobody gets one that another holds, nothing is lost, and what was used last stays longest."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from step35_trt.runtime.cache.kv_pages import PagePool, PageTable


@settings(max_examples=100, deadline=None)
@given(data=st.data(), limit=st.integers(1, 8), most_idle=st.integers(0, 8))
def test_a_pool_against_its_description(data: st.DataObject, limit: int, most_idle: int) -> None:
    pool = PagePool(limit, most_idle)
    held: list[int] = []  # a page once for each holder
    keys: dict[bytes, int] = {}
    left: list[int] = []  # registered and held by nobody, the oldest first
    passed: list[int] = []  # likewise, what windows have passed
    touched: set[int] = set()
    for number in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["take", "release", "register", "find"]))
        if action == "take" and pool.free:
            page = pool.take()
            assert page not in held
            assert 0 <= page < limit
            if page in left + passed:
                more = passed if len(passed) >= len(left) else left
                assert page == more.pop(0)
                assert len(left + passed) + 1 >= most_idle or len(touched) == limit
                keys = {key: of for key, of in keys.items() if of != page}
            touched.add(page)
            held.append(page)
        elif action == "release" and held:
            page = held.pop(data.draw(st.integers(0, len(held) - 1)))
            behind = data.draw(st.booleans())
            pool.release(page, passed=behind)
            if page not in held and page in keys.values():
                (passed if behind else left).append(page)
        elif action == "register" and held:
            page = data.draw(st.sampled_from(held))
            if page not in keys.values():
                keys[bytes([number])] = page
                pool.register(page, bytes([number]))
        elif keys:
            key = data.draw(st.sampled_from(sorted(keys)))
            page = keys[key]
            assert pool.find(key) == page
            pool.hold(page)
            held.append(page)
            left, passed = ([other for other in idle if other != page] for idle in (left, passed))
        assert pool.held == len(set(held))
        assert pool.free == limit - len(set(held))
        assert all(pool.find(key) == page for key, page in keys.items())


def test_the_first_page_of_a_key_stays() -> None:
    pool = PagePool(2, 2)
    first, second = pool.take(), pool.take()
    pool.register(first, b"k")
    pool.register(second, b"k")
    pool.release(second)
    assert pool.find(b"k") == first
    assert pool.take() == second


@settings(max_examples=100, deadline=None)
@given(
    window=st.sampled_from([0, 1, 64, 100]),
    lengths=st.lists(st.tuples(st.integers(1, 300), st.integers(0, 8)), min_size=1, max_size=6),
)
def test_a_table_holds_what_is_seen(window: int, lengths: list[tuple[int, int]]) -> None:
    """Exactly the pages with a row that a token from `length - rejected` on sees."""
    pool = PagePool(64, 0)
    table, length = PageTable("window", pool, window), 0
    for size, rejected in lengths:
        table.reserve(length + size)
        length = max(length + size - rejected, length)
        table.drop(length)
        table.truncate(length)
        seen = max(length - window + 1, 0) // 64 if window else 0
        pages = table.entries.tolist()
        assert [page >= 0 for page in pages] == [seen <= p < -(-length // 64) for p in range(len(pages))]
        assert pool.held == sum(page >= 0 for page in pages)
    table.truncate(0)
    assert pool.held == 0


def test_a_long_prompt_leaves_the_ends_of_others() -> None:
    """What its window passes is more than is kept: of that the oldest goes, not what others ended with."""
    pool = PagePool(6, 6)
    ended, long = PageTable("t", pool, 32), PageTable("t", pool, 32)
    ended.reserve(128)
    for page in range(2):
        pool.register(int(ended.entries[page]), bytes([page]))
    ended.truncate(0)
    for page in range(9):
        long.reserve(64 * (page + 1))
        pool.register(int(long.entries[page]), bytes([100 + page]))
        long.drop(64 * (page + 1))
    assert pool.find(bytes([0])) is not None
    assert pool.find(bytes([1])) is not None
    assert pool.find(bytes([100])) is None
