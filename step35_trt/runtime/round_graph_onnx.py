"""A graph of ONNX Runtime that drafts and verifies (`dialects/onnx_round.py`), over its parts' pages."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import onnxruntime as ort

from step35_trt.runtime.cache.kv_rows import table_width

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Sequence as SequenceOf

    from numpy.typing import NDArray

    from step35_trt.runtime.cache.graph_caches import GraphCaches
    from step35_trt.runtime.cache.kv_rows import CachedRows
    from step35_trt.runtime.programs.round_packing import PackedRound
    from step35_trt.runtime.session import Floats, Ids

T = TypeVar("T", bound=np.generic)
MOST_KEPT = 256  # forms of rounds whose arrays stay bound; eight sequences of one depth have up to 165


@dataclass(frozen=True)
class RoundRows:
    """What a round made; overwritten by the next one.

    Attributes:
        drafts: `[d]`, module by module.
        choices: `[r]`, the decoder's.
        hidden: `[t, D]` of each step.
    """

    drafts: Ids
    choices: Ids
    hidden: tuple[Floats, ...]


@dataclass(frozen=True)
class _Step:
    """Arrays that a step reads and that change from round to round."""

    pasts: Ids
    pages: tuple[Ids, ...]
    held: Floats | None


@dataclass(frozen=True)
class _Shared:
    """Where rounds of every form have their largest arrays: at the beginning of these, as one runs at a time.

    Attributes:
        held: `[S, R, D]`, what each step reads of earlier rounds.
        hidden: `[S, R, D]`.
        drafts: `[R]`.
        choices: `[R]`.
    """

    held: Floats
    hidden: Floats
    drafts: Ids
    choices: Ids

    @classmethod
    def of(cls, steps: int, rows: int, width: int) -> _Shared:
        held, hidden = np.empty((2, steps, rows, width), np.float32)
        drafts, choices = np.empty((2, rows), np.int64)
        return cls(held, hidden, drafts, choices)

    @property
    def rows(self) -> int:
        """Tokens of a step, at most."""
        return len(self.choices)


class _Arrays:
    """A binding with the arrays whose addresses it knows; binding one takes as long as a small node."""

    def __init__(self, graph: ort.InferenceSession, caches: Mapping[str, ort.OrtValue]) -> None:
        self.binding: Any = graph.io_binding()
        self._arrays: dict[str, NDArray[Any]] = {}
        for name, value in caches.items():
            self.binding.bind_ortvalue_input(f"past_{name}", value)
            self.binding.bind_ortvalue_output(name, value)

    def own(self, name: str, shape: tuple[int, ...]) -> Ids:
        """Whole numbers that an input is read from."""
        array = self._arrays.get(name)
        if array is None or array.shape != shape:
            array = self._arrays[name] = np.zeros(shape, np.int64)
            self.binding.bind_cpu_input(name, array)
        return array

    def read(self, name: str, shared: NDArray[T]) -> NDArray[T]:
        """Read an input from the beginning of what is shared."""
        if self._is_longer_or_shorter(name, shared):
            self.binding.bind_cpu_input(name, shared)
        return shared

    def write(self, name: str, shared: NDArray[T]) -> NDArray[T]:
        """Write an output to the beginning of what is shared."""
        if self._is_longer_or_shorter(name, shared):
            address = shared.ctypes.data
            self.binding.bind_output(name, "cpu", 0, shared.dtype.type, shared.shape, address)
        return shared

    def _is_longer_or_shorter(self, name: str, shared: NDArray[Any]) -> bool:
        before, self._arrays[name] = self._arrays.get(name), shared
        return before is None or len(before) != len(shared)


@dataclass(frozen=True)
class _Bound:
    """What rounds of one form are run on."""

    arrays: _Arrays
    known: Ids
    steps: tuple[_Step, ...]
    made: RoundRows


class RoundGraph:
    """The graph of one depth, bound to the caches of the decoder and of its modules.

    Args:
        graph: The loaded graph.
        caches: The modules' and then the decoder's, as the steps run.
        width: D.
    """

    def __init__(self, graph: ort.InferenceSession, caches: SequenceOf[GraphCaches], width: int) -> None:
        self._graph = graph
        self._windows = [tuple(cache.windows) for cache in caches]
        self._caches = {
            name: ort.OrtValue.ortvalue_from_numpy(array)
            for cache in caches
            for name, array in cache.pages.items()
        }
        self._shared = _Shared.of(len(caches), 1, width)
        self._kept: OrderedDict[tuple[PackedRound, int], _Bound] = OrderedDict()

    def run(
        self,
        packed: PackedRound,
        known: SequenceOf[int],
        rows: SequenceOf[SequenceOf[CachedRows]],
        hidden: SequenceOf[SequenceOf[Floats]],
    ) -> RoundRows:
        """Run a round; pages for its rows are reserved.

        Args:
            packed: Its steps.
            known: Token ids.
            rows: Of each step, those of each sequence.
            hidden: Of each step, what sequences take from earlier rounds; nothing for the decoder.
        """
        key = packed, table_width(one for step in rows for one in step)
        bound = self._kept.pop(key, None) or self._bind(*key)
        bound.known[:] = known
        for step, held, taken in zip(bound.steps, rows, hidden, strict=True):
            step.pasts[:] = [one.length for one in held]
            for place, one in enumerate(held):
                for pages, table in zip(step.pages, one.tables, strict=True):
                    table.write(pages[place])
            if taken:
                np.concatenate(taken, out=step.held)
        self._graph.run_with_iobinding(bound.arrays.binding)
        self._kept[key] = bound
        return bound.made

    def _arrays(self, packed: PackedRound) -> _Arrays:
        """New ones, or those of the form that came up longest ago, most of whose sizes are right."""
        tokens = max(len(step.ids) for step in packed.steps)
        if tokens > self._shared.rows:
            self._kept.clear()  # they know the old addresses
            self._shared = _Shared.of(len(packed.steps), 2 * tokens, self._shared.hidden.shape[-1])
        if len(self._kept) < MOST_KEPT:
            return _Arrays(self._graph, self._caches)
        return self._kept.popitem(last=False)[1].arrays

    def _bind(self, packed: PackedRound, width: int) -> _Bound:
        arrays = self._arrays(packed)
        shared, steps, hidden = self._shared, [], []
        for number, step in enumerate(packed.steps):
            scope = "decoder." if number + 1 == len(packed.steps) else f"mtp-{number}."
            fixed = {"ids": step.ids, "rows": step.rows, "starts": step.starts, "carried": step.carried}
            for name, values in fixed.items():
                if values is not None:
                    arrays.own(scope + name, (len(values),))[:] = values
            members, held = len(step.members), sum(first - end for first, end in step.taken)
            pages = tuple(
                arrays.own(f"{scope}pages.{table}", (members, width)) for table in self._windows[number]
            )
            taken = arrays.read(f"{scope}held", shared.held[number, :held]) if step.taken else None
            steps.append(_Step(arrays.own(f"{scope}pasts", (members,)), pages, taken))
            hidden.append(arrays.write(f"{scope}hidden", shared.hidden[number, : len(step.ids)]))
        drafts = arrays.write("drafts", shared.drafts[: sum(len(step.rows) for step in packed.steps[:-1])])
        choices = arrays.write("choices", shared.choices[: len(packed.steps[-1].rows)])
        known = arrays.own("known", (sum(packed.known),))
        return _Bound(arrays, known, tuple(steps), RoundRows(drafts, choices, tuple(hidden)))
