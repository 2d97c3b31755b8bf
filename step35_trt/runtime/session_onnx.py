"""The ONNX Runtime session: a bundle on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from step35_trt.runtime.cache.graph_caches import GraphCaches
from step35_trt.runtime.cache.hidden_rows import HiddenRows
from step35_trt.runtime.cache.kv_pages import PAGE_ROWS, pages_for
from step35_trt.runtime.cache.kv_sequence import SequenceRows
from step35_trt.runtime.graph_onnx import CachedGraph, inference_session
from step35_trt.runtime.packing import Packed, check_context
from step35_trt.runtime.programs.orders import DECODER
from step35_trt.runtime.round_graph_onnx import RoundGraph
from step35_trt.runtime.rounds_onnx import QUERIES, OnnxRounds
from step35_trt.runtime.session import Call, Capacity

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf
    from pathlib import Path

    from onnxruntime import InferenceSession

    from step35_trt.config import Step35Config
    from step35_trt.program import Program, Segment
    from step35_trt.runtime.session import Floats, Ids, Sequence, Step

# Hidden rows that are kept: before a round no module is further behind than twice QUERIES, and what refused
# drafts have written after the round before is less than that.
HELD = 4 * QUERIES


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
    _caches: dict[int, GraphCaches] = field(default_factory=dict, init=False, repr=False)
    _graphs: dict[int, CachedGraph] = field(default_factory=dict, init=False, repr=False)
    _round_graphs: dict[int, RoundGraph] = field(default_factory=dict, init=False, repr=False)

    def caches(self, number: int) -> GraphCaches:
        """The `DECODER`'s, or of k + 1 those of MTP module k."""
        if number not in self._caches:
            rows = pages_for(self.cache_tokens) * PAGE_ROWS
            self._caches[number] = GraphCaches.of(self._segment(number).caches, number, rows)
        return self._caches[number]

    def graph(self, number: int) -> CachedGraph:
        """The `DECODER`'s, or k + 1 for MTP module k."""
        if number not in self._graphs:
            graph = self._load(self._segment(number).file)
            self._graphs[number] = CachedGraph(graph, self.caches(number), self.config)
        return self._graphs[number]

    def round_graph(self, depth: int) -> RoundGraph:
        """The one that drafts so many tokens, at least one, and verifies them."""
        if depth not in self._round_graphs:
            caches = [self.caches(graph) for graph in (*range(1, 1 + depth), DECODER)]
            graph = self._load(self.program.rounds[depth - 1])
            self._round_graphs[depth] = RoundGraph(graph, caches, self.config.hidden_size)
        return self._round_graphs[depth]

    def _segment(self, number: int) -> Segment:
        return (self.program.mtp[number - 1] if number else self.program.decoder)[0]

    def _load(self, file: str) -> InferenceSession:
        library = self._segment(DECODER).library
        return inference_session(self.directory / file, self.directory / library if library else None)

    @property
    def capacity(self) -> Capacity:
        """See `Session`."""
        self.caches(DECODER)
        pages = min(pool.free for caches in self._caches.values() for pool in caches.pools.values())
        return Capacity(sequences=pages, rows=pages * PAGE_ROWS, page_rows=PAGE_ROWS)

    @property
    def rounds(self) -> OnnxRounds | None:
        """See `OffersRounds`; bundles of earlier builds have none."""
        return OnnxRounds(self) if self.program.rounds else None

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
        sequences = [self.own(call.sequence) for call in calls]
        held = [sequence.held.of(graph) for sequence in sequences]
        check_context(calls, [rows.length for rows in held], self.max_tokens)
        steps = self.graph(graph).run(held, Packed.of(calls))
        for sequence, call, step in zip(sequences, calls, steps, strict=True):
            sequence.ran(graph, call.token_ids.tolist(), step.hidden)
        return steps

    def own(self, sequence: Sequence) -> OnnxSequence:
        """A sequence of this session as what it is."""
        assert isinstance(sequence, OnnxSequence)
        assert sequence.session is self
        return sequence


class OnnxSequence:
    """`Sequence` with rows in every graph that has run on it."""

    def __init__(self, session: OnnxSession) -> None:
        self.session = session
        self.held = SequenceRows(lambda graph: session.caches(graph).rows())
        self._hidden: dict[int, HiddenRows] = {}

    def hidden(self, graph: int) -> HiddenRows:
        """The last rows that a graph has put out, for the module that continues from them."""
        return self._hidden[graph]

    def ran(self, graph: int, token_ids: SequenceOf[int], hidden: Floats) -> None:
        """Count the rows of a call, and keep what it put out `[T, D]`."""
        rows = self.held.of(graph)
        if graph < len(self.session.program.rounds):
            last = hidden[-HELD:]  # a prompt's chunk is longer
            first = rows.length + len(hidden) - len(last)
            kept = self._hidden.get(graph)
            if kept is None or not kept.first <= first <= kept.end:
                kept = self._hidden[graph] = HiddenRows(first)
            kept.cut(first)
            kept.append(last)
            kept.drop(kept.end - HELD)
        rows.append(token_ids)
        self.held.settled(rows)

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
