"""Key/value buffers of one sequence and graph, and how rows are taken back from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from step35_trt.program import CacheSpec

# Rows of a window cache beyond its window (a quarter of the window, if that is more): rows move once in so
# many tokens, and a move costs a new binding.
SPARE_ROWS = 64
TILE_ROWS = 16  # our own attention keeps keys in tiles of so many rows: no capacity cuts one
FIRST_ROWS = 256  # a linear cache starts with room for these and doubles
# Rows a caller may take back from the latest call: three drafts, and a few to spare.
MOST_REJECTED = 8


@dataclass(frozen=True)
class Layout:
    """ONNX Runtime's window cache of `capacity` rows over `window` (from its operator's documentation).

    When the cache is full, `capacity - window + 1` rows go at once; the rest moves to the front.
    """

    window: int
    capacity: int

    def evictions(self, total: int) -> int:
        """How often rows have been dropped once `total` tokens were seen."""
        step = self.capacity - self.window + 1
        return max(0, -(-(total - self.capacity) // step))

    def first(self, total: int) -> int:
        """The position that row 0 holds after `total` tokens."""
        return self.evictions(total) * (self.capacity - self.window + 1)


@dataclass
class LayerBuffers:
    """Keys and values `[1, G, capacity, d]` of a layer."""

    spec: CacheSpec
    capacity: int
    keys: NDArray[np.float32] = field(init=False)
    values: NDArray[np.float32] = field(init=False)
    before: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None

    def __post_init__(self) -> None:
        self.keys, self.values = self.empty(), self.empty()

    def empty(self) -> NDArray[np.float32]:
        """A new buffer of the layer's shape."""
        return np.zeros((1, self.spec.kv_heads, self.capacity, self.spec.head_dim), np.float32)

    def grow(self, capacity: int) -> None:
        """Make a linear cache larger, keeping its rows."""
        old_keys, old_values, rows = self.keys, self.values, self.capacity
        self.capacity = capacity
        self.keys, self.values = self.empty(), self.empty()
        self.keys[:, :, :rows], self.values[:, :, :rows] = old_keys, old_values


def _whole_tiles(rows: int) -> int:
    return -(-rows // TILE_ROWS) * TILE_ROWS


class SequenceCache:
    """All layers' buffers of one graph.

    Args:
        specs: The graph's caches.
        max_tokens: The most rows ever held.
        chunk: The most tokens of a call; a ring must hold them beside a whole window.
    """

    def __init__(self, specs: tuple[CacheSpec, ...], max_tokens: int, chunk: int) -> None:
        self.length = 0
        self.max_tokens = max_tokens
        self._last = 0  # rows of the latest call
        self.layers = [LayerBuffers(spec, self._first_capacity(spec, chunk)) for spec in specs]
        # Layers share a few layouts: what a call changes is decided once for each, not once for each layer.
        windows = [layer for layer in self.layers if layer.spec.kind == "compacting"]
        self._layouts = {Layout(layer.spec.window, layer.capacity) for layer in windows}
        self._kept = False  # whether buffers from before an eviction are held

    def _first_capacity(self, spec: CacheSpec, chunk: int) -> int:
        if spec.kind == "linear":
            return _whole_tiles(min(FIRST_ROWS, self.max_tokens))
        if spec.kind == "ring":
            return _whole_tiles(spec.window + chunk + MOST_REJECTED)
        return spec.window + max(SPARE_ROWS, spec.window // 4)

    def pieces(self, tokens: int) -> list[int]:
        """Cut a call so that its last rows can be taken back.

        Of a long call a compacting cache may end up with little more than the window, without the rows that
        an earlier end would look at; then the last few tokens get a call of their own.
        """
        total = self.length + tokens
        if tokens > MOST_REJECTED:
            for layout in self._layouts:
                first = layout.first(total)
                if first and total - first < layout.window + MOST_REJECTED:
                    return [tokens - MOST_REJECTED, MOST_REJECTED]
        return [tokens]

    def prepare(self, tokens: int) -> bool:
        """Make room for a call; True where buffers were exchanged and must be bound anew."""
        total = self.length + tokens
        full = any(layer.spec.kind == "linear" and total > layer.capacity for layer in self.layers)
        moves = self.length > 0 and self._moved(self.length, total)
        if not (full or moves or self._kept):
            return False
        for layer in self.layers:
            layer.before = None
            if layer.spec.kind == "linear" and total > layer.capacity:
                layer.grow(_whole_tiles(min(self.max_tokens, max(total, 2 * layer.capacity))))
            elif layer.spec.kind == "compacting" and moves:
                # Rows will move: keep what was, for the case that the call is taken back in part.
                layer.before = layer.keys, layer.values
                layer.keys, layer.values = layer.empty(), layer.empty()
        self._kept = moves
        return True

    def _moved(self, start: int, end: int) -> bool:
        """Whether a window cache of `end` rows lies otherwise than one of `start`."""
        return any(layout.evictions(start) != layout.evictions(end) for layout in self._layouts)

    def advance(self, tokens: int) -> None:
        """Count a finished call."""
        self.length += tokens
        self._last = tokens

    def truncate(self, length: int) -> None:
        """Forget rows at and after `length`, which lie in the latest call."""
        assert self.length - self._last <= length <= self.length, "only the latest call can be taken back"
        if self._moved(length, self.length):
            for layer in self.layers:
                if layer.spec.kind == "compacting":
                    self._restore(layer, length)
        self._last -= self.length - length
        self.length = length

    def _restore(self, layer: LayerBuffers, length: int) -> None:
        """Put rows where they would lie had the call ended at `length`.

        Those that the call's own eviction dropped come from the buffers kept before it. Rows that neither
        holds lie outside the window of every later token (see `pieces`).
        """
        layout = Layout(layer.spec.window, layer.capacity)
        now, then, start = layout.first(self.length), layout.first(length), self.length - self._last
        if now == then:
            return
        old = layout.first(start)
        saved = layer.before or (None, None)
        for buffer, kept in ((layer.keys, saved[0]), (layer.values, saved[1])):
            moved = buffer.copy()
            low = max(then, now)
            buffer[:, :, low - then : length - then] = moved[:, :, low - now : length - now]
            high = min(start, now)
            if kept is not None and high > then:
                buffer[:, :, : high - then] = kept[:, :, then - old : high - old]
