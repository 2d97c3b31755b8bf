"""Which keys a program reads, and where they lie."""

import triton
import triton.language as tl


@triton.jit
def first_tile(position, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the first tile starts that a query at or after `position` can see; a multiple of `BLOCK_N`.

    Tiles stand at the same positions for whoever asks, so a key always meets the same neighbours.
    """
    return tl.maximum(position - WINDOW + 1, 0) // BLOCK_N * BLOCK_N if WINDOW > 0 else 0


@triton.jit
def split_keys(span, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr):
    """Keys of one split: a function of the sequence alone, so a result does not depend on its neighbours."""
    return tl.maximum(LEAST, tl.cdiv(tl.cdiv(span, SPLITS), BLOCK_N) * BLOCK_N)


@triton.jit
def tile_offset(table, table_pages, group, tile, KV_HEADS: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr):
    """First element of the rows from position `tile` on, in `[pages, G, PAGE, d]`; they lie in one page."""
    page = tl.load(table + (tile // PAGE) % table_pages).to(tl.int64)
    return ((page * KV_HEADS + group) * PAGE + tile % PAGE) * D
