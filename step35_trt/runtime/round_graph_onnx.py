"""A graph of ONNX Runtime that drafts and verifies (`dialects/onnx_round.py`), over its parts' pages."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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

MOST_KEPT = 24  # forms of rounds whose arrays stay bound: one sequence has hardly more


@dataclass(frozen=True)
class RoundRows:
    """What a round made; overwritten by the next one like it.

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


class _Arrays:
    """A binding with the arrays whose addresses it knows; binding one takes as long as a small node."""

    def __init__(self, graph: ort.InferenceSession, caches: Mapping[str, ort.OrtValue]) -> None:
        self.binding: Any = graph.io_binding()
        self._arrays: dict[str, NDArray[Any]] = {}
        for name, value in caches.items():
            self.binding.bind_ortvalue_input(f"past_{name}", value)
            self.binding.bind_ortvalue_output(name, value)

    def given(self, name: str, shape: tuple[int, ...], dtype: type[np.generic] = np.int64) -> NDArray[Any]:
        """What an input is read from."""
        array = self._arrays.get(name)
        if array is None or array.shape != shape:
            array = self._arrays[name] = np.zeros(shape, dtype)
            self.binding.bind_cpu_input(name, array)
        return array

    def made(self, name: str, shape: tuple[int, ...], dtype: type[np.generic] = np.int64) -> NDArray[Any]:
        """Where an output goes."""
        array = self._arrays.get(name)
        if array is None or array.shape != shape:
            array = self._arrays[name] = np.empty(shape, dtype)
            self.binding.bind_output(name, "cpu", 0, dtype, shape, array.ctypes.data)
        return array


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
        self._graph, self._width = graph, width
        self._windows = [tuple(cache.windows) for cache in caches]
        self._caches = {
            name: ort.OrtValue.ortvalue_from_numpy(array)
            for cache in caches
            for name, array in cache.pages.items()
        }
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
        bound = self._kept.pop(key, None) or self._bind(*key, self._free_arrays())
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

    def _free_arrays(self) -> _Arrays:
        """Those of the form that came up longest ago, most of whose sizes are right."""
        if len(self._kept) < MOST_KEPT:
            return _Arrays(self._graph, self._caches)
        return self._kept.popitem(last=False)[1].arrays

    def _bind(self, packed: PackedRound, width: int, arrays: _Arrays) -> _Bound:
        steps, hidden = [], []
        for number, step in enumerate(packed.steps):
            scope = "decoder." if number + 1 == len(packed.steps) else f"mtp-{number}."
            fixed = {"ids": step.ids, "rows": step.rows, "starts": step.starts, "carried": step.carried}
            for name, values in fixed.items():
                if values is not None:
                    arrays.given(scope + name, (len(values),))[:] = values
            members, held = len(step.members), sum(first - end for first, end in step.taken)
            steps.append(
                _Step(
                    arrays.given(f"{scope}pasts", (members,)),
                    tuple(
                        arrays.given(f"{scope}pages.{table}", (members, width))
                        for table in self._windows[number]
                    ),
                    arrays.given(f"{scope}held", (held, self._width), np.float32) if step.taken else None,
                )
            )
            hidden.append(arrays.made(f"{scope}hidden", (len(step.ids), self._width), np.float32))
        drafts = arrays.made("drafts", (sum(len(step.rows) for step in packed.steps[:-1]),))
        choices = arrays.made("choices", (len(packed.steps[-1].rows),))
        known = arrays.given("known", (sum(packed.known),))
        return _Bound(arrays, known, tuple(steps), RoundRows(drafts, choices, tuple(hidden)))
