"""Exported graphs behind the session protocol: what a program that runs them has to do, as simple as can be.

One sequence at a time, caches handed from call to call. Rows are taken back by going to the caches of before
the latest call and running what stays of it again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from step35_trt.runtime.graph_onnx import inference_session
from step35_trt.runtime.packing import UNBOUNDED
from step35_trt.runtime.session import Call, Step

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf
    from pathlib import Path

    import onnxruntime as ort

    from step35_trt.config import Step35Config
    from step35_trt.program import CacheSpec, Program, Segment
    from step35_trt.runtime.session import Capacity, Floats, Ids

NO_ROWS = np.empty(0, np.int64)


@dataclass(frozen=True)
class ExportedSession:
    """`Session` over the files of `export_onnx`; ONNX Runtime's window caches have `spare` rows more."""

    directory: Path
    config: Step35Config
    program: Program
    max_tokens: int = 300
    prefill_chunk: int = 64
    spare: int = 64
    _loaded: dict[str, ort.InferenceSession] = field(default_factory=dict)

    def graph(self, segment: Segment) -> ort.InferenceSession:
        if segment.file not in self._loaded:
            self._loaded[segment.file] = inference_session(self.directory / segment.file)
        return self._loaded[segment.file]

    def capacity_of(self, spec: CacheSpec) -> int:
        beyond = {
            "linear": self.max_tokens,
            "ring": spec.window + self.max_tokens,
            "compacting": spec.window + self.spare,
        }
        return beyond[spec.kind]

    @property
    def capacity(self) -> Capacity:
        return UNBOUNDED

    def open(self, prompt_ids: Ids | None = None, modules: int | None = None) -> ExportedSequence:
        return ExportedSequence(self)

    def decode(self, calls: SequenceOf[Call]) -> list[Step]:
        return [call.sequence.decode(call.token_ids, call.rows) for call in calls]

    def draft(self, module: int, calls: SequenceOf[Call]) -> list[Step]:
        steps = []
        for call in calls:
            assert call.hidden is not None
            steps.append(call.sequence.draft(module, call.token_ids, call.hidden, call.rows))
        return steps


class State(NamedTuple):
    length: int
    caches: dict[str, np.ndarray]


@dataclass
class ExportedGraph:
    """A graph and one sequence's caches."""

    session: ExportedSession
    segment: Segment
    state: State = field(init=False)
    before: State = field(init=False)
    latest: tuple[Ids, Floats | None] = (NO_ROWS, None)

    def __post_init__(self) -> None:
        caches = {}
        for spec in self.segment.caches:
            shape = (1, spec.kv_heads, self.session.capacity_of(spec), spec.head_dim)
            for name in ("key", "value"):
                caches[f"{name}.{spec.layer}"] = np.zeros(shape, np.float32)
        self.state = self.before = State(0, caches)

    def run(self, token_ids: Ids, hidden: Floats | None, rows: Ids) -> Step:
        length, caches = self.state
        feeds = {"token_ids": token_ids, "rows": rows, "past_length": np.array([length])}
        feeds |= {f"past_{name}": values for name, values in caches.items()}
        if hidden is not None:
            feeds["carried"] = hidden
        logits, last, *new = self.session.graph(self.segment).run(["logits", "hidden", *caches], feeds)
        self.before, self.latest = self.state, (token_ids, hidden)
        self.state = State(length + len(token_ids), dict(zip(caches, new, strict=True)))
        return Step(logits, last)

    def truncate(self, length: int) -> None:
        keep = length - self.before.length
        assert 0 <= keep <= len(self.latest[0]), "only the latest call can be taken back"
        token_ids, hidden = self.latest
        if keep == len(token_ids):
            return
        self.state, self.latest = self.before, (NO_ROWS, None)
        if keep:
            self.run(token_ids[:keep], None if hidden is None else hidden[:keep], NO_ROWS)


class ExportedSequence:
    """`Sequence` over one `ExportedGraph` for each graph."""

    def __init__(self, session: ExportedSession) -> None:
        program = session.program
        self._decoder = ExportedGraph(session, program.decoder[0])
        self._modules = [ExportedGraph(session, module[0]) for module in program.mtp]

    @property
    def length(self) -> int:
        return self._decoder.state.length

    def decode(self, token_ids: Ids, rows: Ids) -> Step:
        return self._decoder.run(token_ids, None, rows)

    def truncate(self, length: int) -> None:
        self._decoder.truncate(length)

    def draft_length(self, module: int) -> int:
        return self._modules[module].state.length

    def draft(self, module: int, token_ids: Ids, hidden: Floats, rows: Ids) -> Step:
        return self._modules[module].run(token_ids, hidden, rows)

    def truncate_draft(self, module: int, length: int) -> None:
        self._modules[module].truncate(length)

    def close(self) -> None:
        pass
