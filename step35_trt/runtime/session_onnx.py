"""The ONNX Runtime session: a bundle on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from step35_trt.runtime.graph_onnx import CachedGraph, inference_session
from step35_trt.runtime.kv_pages import PAGE_ROWS, pages_for
from step35_trt.runtime.kv_rows import CachedRows, Prefixes, reusable_pages
from step35_trt.runtime.packing import Packed, check_context
from step35_trt.runtime.session import Call, Capacity

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf
    from pathlib import Path

    from step35_trt.config import Step35Config
    from step35_trt.program import Program, Segment
    from step35_trt.runtime.session import Floats, Ids, Step

DECODER = -1


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

    def graph(self, module: int) -> CachedGraph:
        """A module's graph, or the `DECODER`'s."""
        if module not in self._loaded:
            segment = self._segment(module)
            library = self.directory / segment.library if segment.library else None
            graph = inference_session(self.directory / segment.file, library)
            rows = pages_for(self.cache_tokens) * PAGE_ROWS
            self._loaded[module] = CachedGraph(graph, segment.caches, module + 1, rows, self.config)
        return self._loaded[module]

    def _segment(self, module: int) -> Segment:
        return (self.program.decoder if module == DECODER else self.program.mtp[module])[0]

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
            modules = len(self.program.mtp) if modules is None else modules
            sequence.begin_with(prompt_ids.tolist(), range(modules))
        return sequence

    def decode(self, calls: SequenceOf[Call]) -> list[Step]:
        """See `Session`."""
        return self._run(DECODER, calls)

    def draft(self, module: int, calls: SequenceOf[Call]) -> list[Step]:
        """See `Session`."""
        return self._run(module, calls)

    def _run(self, module: int, calls: SequenceOf[Call]) -> list[Step]:
        sequences = [_own(call, self) for call in calls]
        held = [sequence.rows(module) for sequence in sequences]
        check_context(calls, [rows.length for rows in held], self.max_tokens)
        steps = self.graph(module).run(held, Packed.of(calls))
        for sequence, rows, call in zip(sequences, held, calls, strict=True):
            rows.append(call.token_ids)
            sequence.settled(rows)
        return steps


class OnnxSequence:
    """`Sequence` with rows in every graph that has run on it."""

    def __init__(self, session: OnnxSession) -> None:
        self.session = session
        self._closed = False
        self._rows: dict[int, CachedRows] = {}
        self._decoder = self.rows(DECODER)
        self._prefixes = Prefixes(self._decoder.tokens)

    def rows(self, module: int) -> CachedRows:
        """Those of a module, or of the `DECODER`."""
        assert not self._closed, "the sequence is closed"
        if module not in self._rows:
            self._rows[module] = self.session.graph(module).rows()
        return self._rows[module]

    def begin_with(self, prompt: list[int], modules: range) -> None:
        """Take over what is cached of a prompt; the sequence is empty (see `Session.open`)."""
        graphs, prefixes = [self.rows(module) for module in (DECODER, *modules)], Prefixes(prompt)
        left = max(len(modules), 1)
        pages = reusable_pages(graphs, prefixes, max(len(prompt) - left, 0) // PAGE_ROWS)
        for rows in graphs:
            rows.begin_with(pages, prefixes)
        self._prefixes = prefixes.of(self._decoder.tokens, pages)

    def settled(self, rows: CachedRows) -> None:
        """Of rows just run: make findable what cannot be taken back, and give back what nobody will see."""
        rows.register(self._decoder, self._prefixes)
        rows.drop()

    @property
    def length(self) -> int:
        """See `Sequence`."""
        return self._decoder.length

    def decode(self, token_ids: Ids, rows: Ids) -> Step:
        """See `Sequence`."""
        return self.session.decode([Call(self, token_ids, rows)])[0]

    def truncate(self, length: int) -> None:
        """See `Sequence`."""
        self._decoder.truncate(length)

    def draft_length(self, module: int) -> int:
        """See `Sequence`."""
        return self._rows[module].length if module in self._rows else 0

    def draft(self, module: int, token_ids: Ids, hidden: Floats, rows: Ids) -> Step:
        """See `Sequence`."""
        return self.session.draft(module, [Call(self, token_ids, rows, hidden)])[0]

    def truncate_draft(self, module: int, length: int) -> None:
        """See `Sequence`."""
        self._rows[module].truncate(length)

    def close(self) -> None:
        """See `Sequence`; what it leaves behind can be found until its pages are needed."""
        if self._closed:
            return
        self._closed = True
        for rows in self._rows.values():
            rows.settle()
        for rows in self._rows.values():
            rows.register(self._decoder, self._prefixes)
            rows.close()

    def __del__(self) -> None:
        self.close()


def _own(call: Call, session: OnnxSession) -> OnnxSequence:
    assert isinstance(call.sequence, OnnxSequence)
    assert call.sequence.session is session
    return call.sequence
