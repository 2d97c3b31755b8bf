"""A graph of ONNX Runtime that drafts and verifies (`dialects/onnx_round.py`), over its parts' pages."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from numpy.typing import NDArray

    from step35_trt.runtime.cache.graph_caches import GraphCaches
    from step35_trt.runtime.cache.kv_rows import CachedRows
    from step35_trt.runtime.programs.round_packing import PackedRound, PackedStep
    from step35_trt.runtime.session import Floats, Ids

MOST_KEPT = 64  # rounds whose arrays stay bound


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


@dataclass(frozen=True)
class _Bound:
    """A binding for rounds of one form, with the arrays whose addresses it knows."""

    binding: Any
    known: Ids
    steps: tuple[_Step, ...]
    fixed: tuple[NDArray[Any], ...]
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
        most = max(table.count for step in rows for one in step for table in one.tables)
        # Widths are powers of two: arrays are not bound anew with every page.
        key = packed, 1 << (most - 1).bit_length()
        bound = self._kept.pop(key, None) or self._bind(*key)
        bound.known[:] = known
        for step, held, taken in zip(bound.steps, rows, hidden, strict=True):
            step.pasts[:] = [one.length for one in held]
            for place, one in enumerate(held):
                for pages, table in zip(step.pages, one.tables, strict=True):
                    pages[place, : table.count] = table.entries[: table.count]
            if taken:
                np.concatenate(taken, out=step.held)
        self._graph.run_with_iobinding(bound.binding)
        self._kept[key] = bound
        if len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)
        return bound.made

    def _bind(self, packed: PackedRound, width: int) -> _Bound:
        binding = self._graph.io_binding()
        for name, value in self._caches.items():
            binding.bind_ortvalue_input(f"past_{name}", value)
            binding.bind_ortvalue_output(name, value)
        fixed = []

        def given(name: str, array: NDArray[Any]) -> NDArray[Any]:
            fixed.append(array)
            binding.bind_cpu_input(name, array)
            return array

        def made(name: str, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
            array = np.empty(shape, dtype)
            binding.bind_output(name, "cpu", 0, dtype, shape, array.ctypes.data)
            return array

        known = given("known", np.zeros(sum(packed.known), np.int64))
        steps, hidden = [], []
        for number, step in enumerate(packed.steps):
            scope = "decoder." if number + 1 == len(packed.steps) else f"mtp-{number}."
            for name, values in (("ids", step.ids), ("rows", step.rows), ("starts", step.starts)):
                given(scope + name, np.array(values, np.int64))
            if step.carried is not None:
                given(f"{scope}carried", np.array(step.carried, np.int64))
            steps.append(self._step(scope, step, self._windows[number], width, given))
            hidden.append(made(f"{scope}hidden", (len(step.ids), self._width), np.float32))
        drafts = made("drafts", (sum(len(step.rows) for step in packed.steps[:-1]),), np.int64)
        choices = made("choices", (len(packed.steps[-1].rows),), np.int64)
        return _Bound(binding, known, tuple(steps), tuple(fixed), RoundRows(drafts, choices, tuple(hidden)))

    def _step(self, scope: str, step: PackedStep, tables: SequenceOf[str], width: int, given: Any) -> _Step:
        members = len(step.members)
        held = sum(first - end for first, end in step.taken)
        return _Step(
            given(f"{scope}pasts", np.zeros(members, np.int64)),
            tuple(given(f"{scope}pages.{table}", np.zeros((members, width), np.int64)) for table in tables),
            given(f"{scope}held", np.zeros((held, self._width), np.float32)) if step.taken else None,
        )
