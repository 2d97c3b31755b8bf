"""A graph of ONNX Runtime over the pages of all its sequences."""

from __future__ import annotations

import platform
from collections import OrderedDict
from dataclasses import dataclass
from itertools import accumulate
from sys import getrefcount
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from step35_trt.errors import CorruptInputError, UnsupportedError
from step35_trt.runtime.cache.kv_pages import NONE, reserve
from step35_trt.runtime.cache.kv_rows import table_width

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf
    from pathlib import Path

    from step35_trt.config import Step35Config
    from step35_trt.runtime.cache.graph_caches import GraphCaches
    from step35_trt.runtime.cache.kv_rows import CachedRows
    from step35_trt.runtime.packing import Packed
    from step35_trt.runtime.session import Floats, Step

MOST_KEPT = 64  # bindings, and tokens of a call whose binding is kept


def inference_session(model: Path, library: Path | None = None) -> ort.InferenceSession:
    """Load a graph and the operators it needs; one thread for each core.

    Raises:
        UnsupportedError: the operators were compiled for another kind of processor.
        CorruptInputError: the runtime refuses the file.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Between two calls the sampler needs the cores; spinning workers would hold them.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if library is not None:
        if platform.machine() not in library.name:
            raise UnsupportedError(
                f"the bundle's operators {library.name} are not for this machine ({platform.machine()})",
                "Build the bundle on a machine of this kind.",
            )
        options.register_custom_ops_library(str(library))
    try:
        return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's exceptions have no common base
        first_line = str(error).splitlines()[0]
        raise CorruptInputError(f"{model.name} cannot be loaded: {first_line}") from None


@dataclass(frozen=True)
class _Results:
    """Where a call's results go. Steps are views of it: while there are any, it is somebody's."""

    logits: Floats
    hidden: Floats

    @classmethod
    def empty(cls, rows: int, tokens: int, config: Step35Config) -> _Results:
        return cls(
            np.empty((rows, config.vocab_size), np.float32),
            np.empty((tokens, config.hidden_size), np.float32),
        )

    @property
    def is_free(self) -> bool:
        """Whether no view is left; a view of a view refers to the array itself."""
        # One reference is the attribute's, one the argument's.
        return getrefcount(self.logits) == 2 and getrefcount(self.hidden) == 2


@dataclass
class _Call:
    """A binding for calls of one size, with the arrays it reads and writes; it knows their addresses only."""

    binding: Any
    inputs: dict[str, Any]
    results: _Results | None = None


class CachedGraph:
    """A graph and the caches of all sequences that run on it.

    Args:
        graph: The loaded graph.
        caches: Its caches.
        config: The model.
    """

    def __init__(self, graph: ort.InferenceSession, caches: GraphCaches, config: Step35Config) -> None:
        self._graph, self._caches, self._config = graph, caches, config
        self._kept: OrderedDict[tuple[int, ...], _Call] = OrderedDict()
        self._results = _Results.empty(MOST_KEPT, MOST_KEPT, config)

    def run(self, held: SequenceOf[CachedRows], packed: Packed) -> list[Step]:
        """Append each call's tokens to its sequence.

        Raises:
            DoesNotFitError: there are not enough pages; nothing has changed.
        """
        self._reserve(held, packed)
        tokens, wanted = len(packed.token_ids), len(packed.rows)
        size = tokens, wanted, len(held), table_width(held)
        call = self._kept.get(size)
        if call is None:
            call = self._bound(*size, packed.hidden is not None)
        _fill(call.inputs, held, packed)
        # Copying logits for the caller to keep, or binding anew, takes as long as reading several megabytes.
        shared = max(tokens, wanted) <= MOST_KEPT and self._results.is_free
        results = self._results if shared else _Results.empty(wanted, tokens, self._config)
        logits, hidden = results.logits[:wanted], results.hidden[:tokens]
        if call.results is not results:
            _bind_output(call.binding, "logits", logits)
            _bind_output(call.binding, "hidden", hidden)
            call.results = results if shared else None
        self._graph.run_with_iobinding(call.binding)
        if tokens <= MOST_KEPT:
            self._kept[size] = call
            self._kept.move_to_end(size)
        if len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)
        return packed.split(logits, hidden)

    def _reserve(self, held: SequenceOf[CachedRows], packed: Packed) -> None:
        after = [
            (table, rows.length + tokens)
            for rows, tokens in zip(held, packed.lengths, strict=True)
            for table in rows.tables
        ]
        reserve(after)

    def _bound(self, tokens: int, rows: int, sequences: int, width: int, carries: bool) -> _Call:
        inputs: dict[str, Any] = {
            "token_ids": np.zeros(tokens, np.int64),
            "rows": np.zeros(rows, np.int64),
            "starts": np.zeros(sequences + 1, np.int64),
            "pasts": np.zeros(sequences, np.int64),
            **{
                f"pages.{table}": np.full((sequences, width), NONE, np.int64)
                for table in self._caches.windows
            },
        }
        if carries:
            inputs["carried"] = np.zeros((tokens, self._config.hidden_size), np.float32)
        call = _Call(self._graph.io_binding(), inputs)
        for name, array in inputs.items():
            call.binding.bind_cpu_input(name, array)
        for name, array in self._caches.pages.items():
            call.binding.bind_cpu_input(f"past_{name}", array)
            _bind_output(call.binding, name, array)
        return call


def _fill(inputs: dict[str, Any], held: SequenceOf[CachedRows], packed: Packed) -> None:
    inputs["token_ids"][:], inputs["rows"][:] = packed.token_ids, packed.rows
    inputs["starts"][1:] = list(accumulate(packed.lengths))
    inputs["pasts"][:] = [rows.length for rows in held]
    if packed.hidden is not None:
        inputs["carried"][:] = packed.hidden
    for place, rows in enumerate(held):
        for table in rows.tables:
            table.write(inputs[f"pages.{table.name}"][place])


def _bind_output(binding: Any, name: str, array: Floats) -> None:
    binding.bind_output(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
