"""The ONNX Runtime session: a bundle on the CPU."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from step35_trt.errors import CorruptInputError, DoesNotFitError, UnsupportedError
from step35_trt.runtime.kv_cache import SequenceCache
from step35_trt.runtime.session import Step

if TYPE_CHECKING:
    from pathlib import Path

    from step35_trt.config import Step35Config
    from step35_trt.program import CacheSpec, Program, Segment
    from step35_trt.runtime.session import Floats, Ids

MOST_KEPT = 8  # tokens of a call whose binding is kept


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
class OnnxSession:
    """`Session` over a directory of graphs. A module's graph is loaded when it is first used."""

    directory: Path
    config: Step35Config
    program: Program
    max_tokens: int
    prefill_chunk: int
    _loaded: dict[str, ort.InferenceSession] = field(default_factory=dict)

    def graph(self, segment: Segment) -> ort.InferenceSession:
        """The loaded graph of a segment."""
        if segment.file not in self._loaded:
            library = self.directory / segment.library if segment.library else None
            self._loaded[segment.file] = inference_session(self.directory / segment.file, library)
        return self._loaded[segment.file]

    def open(self) -> OnnxSequence:
        """See `Session`."""
        return OnnxSequence(self)


@dataclass
class OnnxSequence:
    """`Sequence` with one cache for each graph."""

    session: OnnxSession
    _modules: dict[int, _CachedGraph] = field(default_factory=dict)

    @cached_property
    def _decoder(self) -> _CachedGraph:
        return self._graph(self.session.program.decoder[0])

    def _module(self, module: int) -> _CachedGraph:
        if module not in self._modules:
            self._modules[module] = self._graph(self.session.program.mtp[module][0])
        return self._modules[module]

    def _graph(self, segment: Segment) -> _CachedGraph:
        session = self.session
        return _CachedGraph(session.graph(segment), segment.caches, session)

    @property
    def length(self) -> int:
        """See `Sequence`."""
        return self._decoder.cache.length

    def decode(self, token_ids: Ids, rows: Ids) -> Step:
        """See `Sequence`."""
        return self._decoder.run(token_ids, None, rows)

    def truncate(self, length: int) -> None:
        """See `Sequence`."""
        self._decoder.cache.truncate(length)

    def draft_length(self, module: int) -> int:
        """See `Sequence`."""
        return self._modules[module].cache.length if module in self._modules else 0

    def draft(self, module: int, token_ids: Ids, hidden: Floats, rows: Ids) -> Step:
        """See `Sequence`."""
        return self._module(module).run(token_ids, hidden, rows)

    def truncate_draft(self, module: int, length: int) -> None:
        """See `Sequence`."""
        self._modules[module].cache.truncate(length)


@dataclass(frozen=True)
class _Call:
    """A binding for calls of one size, with the arrays it reads and writes; it knows their addresses only."""

    binding: Any
    token_ids: Ids
    rows: Ids
    past_length: Ids
    carried: Floats
    step: Step


class _CachedGraph:
    """A graph over one sequence's buffers.

    Bindings of short calls are kept: making one costs as much as a small graph's run.
    """

    def __init__(
        self, graph: ort.InferenceSession, specs: tuple[CacheSpec, ...], session: OnnxSession
    ) -> None:
        self.graph = graph
        self.config = session.config
        self.cache = SequenceCache(specs, session.max_tokens, session.prefill_chunk)
        self._calls: dict[tuple[int, int], _Call] = {}

    def run(self, token_ids: Ids, hidden: Floats | None, rows: Ids) -> Step:
        if self.cache.length + len(token_ids) > self.cache.max_tokens:
            raise DoesNotFitError(f"the context limit of {self.cache.max_tokens} tokens would be passed")
        pieces = self.cache.pieces(len(token_ids))
        if len(pieces) == 1:
            return self._run_piece(token_ids, hidden, rows)
        steps, start = [], 0
        for size in pieces:
            part = slice(start, start + size)
            wanted = rows[(rows >= start) & (rows < start + size)] - start
            steps.append(self._run_piece(token_ids[part], None if hidden is None else hidden[part], wanted))
            start += size
        return Step(np.concatenate([s.logits for s in steps]), np.concatenate([s.hidden for s in steps]))

    def _run_piece(self, token_ids: Ids, hidden: Floats | None, rows: Ids) -> Step:
        size = len(token_ids), len(rows)
        if self.cache.prepare(size[0]):
            self._calls.clear()
        call = self._calls.get(size) or self._bound(*size, hidden is not None)
        call.token_ids[:], call.rows[:], call.past_length[0] = token_ids, rows, self.cache.length
        if hidden is not None:
            call.carried[:] = hidden
        self.graph.run_with_iobinding(call.binding)
        self.cache.advance(size[0])
        if size[0] > MOST_KEPT:
            return call.step
        self._calls[size] = call
        return Step(call.step.logits.copy(), call.step.hidden.copy())

    def _bound(self, tokens: int, rows: int, carries: bool) -> _Call:
        hidden = self.config.hidden_size
        call = _Call(
            self.graph.io_binding(),
            np.zeros(tokens, np.int64),
            np.zeros(rows, np.int64),
            np.zeros(1, np.int64),
            np.zeros((tokens if carries else 0, hidden), np.float32),
            Step(
                np.empty((rows, self.config.vocab_size), np.float32), np.empty((tokens, hidden), np.float32)
            ),
        )
        for name in ("token_ids", "rows", "past_length", "carried")[: 4 if carries else 3]:
            call.binding.bind_cpu_input(name, getattr(call, name))
        _bind_output(call.binding, "logits", call.step.logits)
        _bind_output(call.binding, "hidden", call.step.hidden)
        for layer in self.cache.layers:
            past = layer.before or (layer.keys, layer.values)
            for name, source, target in (("key", past[0], layer.keys), ("value", past[1], layer.values)):
                call.binding.bind_cpu_input(f"past_{name}.{layer.spec.layer}", source)
                _bind_output(call.binding, f"{name}.{layer.spec.layer}", target)
        return call


def _bind_output(binding: Any, name: str, array: Floats) -> None:
    binding.bind_output(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
