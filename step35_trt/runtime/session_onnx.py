"""The ONNX Runtime session: a bundle on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from step35_trt.runtime.cache.kv_pages import PAGE_ROWS, pages_for
from step35_trt.runtime.cache.kv_sequence import SequenceRows
from step35_trt.runtime.graph_onnx import CachedGraph, inference_session
from step35_trt.runtime.packing import Packed, check_context
from step35_trt.runtime.programs.orders import DECODER
from step35_trt.runtime.session import Call, Capacity

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf
    from pathlib import Path

    from step35_trt.config import Step35Config
    from step35_trt.program import Program
    from step35_trt.runtime.session import Floats, Ids, Step


@dataclass(frozen=True)
class OnnxSession:
    """`Session` over a directory of graphs. A module's graph is loaded when it is first used.

    Attributes:
        directory: The bundle.
        config: The model.
        program: Its graphs.
        max_tokens: Rows of a sequence.
        cache_tokens: Rows of all sequences together.
        prefill_chunk: Tokens of a step.
    """

    directory: Path
    config: Step35Config
    program: Program
    max_tokens: int
    cache_tokens: int
    prefill_chunk: int
    _loaded: dict[int, CachedGraph] = field(default_factory=dict)

    def graph(self, number: int) -> CachedGraph:
        """The `DECODER`'s, or k + 1 for MTP module k."""
        if number not in self._loaded:
            segment = (self.program.mtp[number - 1] if number else self.program.decoder)[0]
            library = self.directory / segment.library if segment.library else None
            graph = inference_session(self.directory / segment.file, library)
            rows = pages_for(self.cache_tokens) * PAGE_ROWS
            self._loaded[number] = CachedGraph(graph, segment.caches, number, rows, self.config)
        return self._loaded[number]

    @property
    def capacity(self) -> Capacity:
        """See `Session`."""
        self.graph(DECODER)
        pages = min(pool.free for graph in self._loaded.values() for pool in graph.pools.values())
        return Capacity(sequences=pages, rows=pages * PAGE_ROWS, page_rows=PAGE_ROWS)

    def open(self, prompt_ids: Ids | None = None, modules: int | None = None) -> OnnxSequence:
        """See `Session`."""
        sequence = OnnxSequence(self)
        if prompt_ids is not None:
            every = len(self.program.mtp)
            sequence.held.begin_with(prompt_ids.tolist(), every if modules is None else modules)
        return sequence

    def decode(self, calls: SequenceOf[Call]) -> list[Step]:
        """See `Session`."""
        return self._run(DECODER, calls)

    def draft(self, module: int, calls: SequenceOf[Call]) -> list[Step]:
        """See `Session`."""
        return self._run(1 + module, calls)

    def _run(self, graph: int, calls: SequenceOf[Call]) -> list[Step]:
        sequences = [_own(call, self) for call in calls]
        held = [sequence.held.of(graph) for sequence in sequences]
        check_context(calls, [rows.length for rows in held], self.max_tokens)
        steps = self.graph(graph).run(held, Packed.of(calls))
        for sequence, rows, call in zip(sequences, held, calls, strict=True):
            rows.append(call.token_ids)
            sequence.held.settled(rows)
        return steps


class OnnxSequence:
    """`Sequence` with rows in every graph that has run on it."""

    def __init__(self, session: OnnxSession) -> None:
        self.session = session
        self.held = SequenceRows(lambda graph: session.graph(graph).rows())

    @property
    def length(self) -> int:
        """See `Sequence`."""
        return self.held.length(DECODER)

    def decode(self, token_ids: Ids, rows: Ids) -> Step:
        """See `Sequence`."""
        return self.session.decode([Call(self, token_ids, rows)])[0]

    def truncate(self, length: int) -> None:
        """See `Sequence`."""
        self.held.of(DECODER).truncate(length)

    def draft_length(self, module: int) -> int:
        """See `Sequence`."""
        return self.held.length(1 + module)

    def draft(self, module: int, token_ids: Ids, hidden: Floats, rows: Ids) -> Step:
        """See `Sequence`."""
        return self.session.draft(module, [Call(self, token_ids, rows, hidden)])[0]

    def truncate_draft(self, module: int, length: int) -> None:
        """See `Sequence`."""
        self.held.of(1 + module).truncate(length)

    def close(self) -> None:
        """See `Sequence`; what it leaves behind can be found until its pages are needed."""
        self.held.close()

    def __del__(self) -> None:
        if "held" in vars(self):  # not where loading the graph failed
            self.close()


def _own(call: Call, session: OnnxSession) -> OnnxSequence:
    assert isinstance(call.sequence, OnnxSequence)
    assert call.sequence.session is session
    return call.sequence
