"""A program against the definition, value by value: which layer is the first that is off?

Each step is judged on its own: it is given the definition's values, and what it makes of them is compared. So
an error is found where it arises and not where it has grown, and a routing decision that rounding may turn
does not spoil what follows. Such a decision counts only where rounding cannot explain it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from step35_trt import model
from step35_trt.dialects.torch import LayerCache, SequenceBatch, TorchOps
from step35_trt.interpret.weights import to_numpy, to_torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from step35_trt.config import Step35Config
    from step35_trt.interpret.network import Array
    from step35_trt.interpret.ranks import RankedSession
    from step35_trt.interpret.weights import FormedWeights
    from step35_trt.runtime.session import Ids
    from step35_trt.steps import Buffer, KernelStep, StepProgram

# How far a value may be from the definition's, as the length of the difference by the value's: over all rows,
# and in a row. Rounding that falls the other way once within a segment moves most of a row by a unit or two.
TOLERANCES = {"float32": (1e-5, 1e-4), "bfloat16": (1e-3, 2.0**-5)}
# Times the first of those for a sum over ranks, twice the second: each rank rounds its summand, up to twice,
# and the sum is rounded again, so that most elements are off by a unit and not few.
SUMMED = 8
# How far an element may be off by rounding alone, as a share of it: half a unit for each of two results.
ROUNDING = {"float32": 2.0**-22, "bfloat16": 2.0**-8}


@dataclass
class Finding:
    """A value that a step made, against the definition's, over all calls.

    Attributes:
        graph: 'decoder' or 'mtp-k'.
        rank: Whose step.
        name: Of the buffer.
        path: The module of the model whose result it is.
        limits: Of `error` and of `worst_row`.
        worst_row: The largest error of a row.
        flips: Rows in which other experts were chosen than by the definition, where the value decides that.
        unexplained: Those of them that rounding does not explain.
    """

    graph: str
    rank: int
    name: str
    path: str
    limits: tuple[float, float]
    worst_row: float = 0.0
    flips: int = 0
    unexplained: int = 0
    _squares: tuple[float, float] = (0.0, 0.0)

    @property
    def error(self) -> float:
        """`|made - wanted| / |wanted|` over all rows."""
        difference, size = self._squares
        return (difference / size) ** 0.5 if size else difference

    @property
    def passed(self) -> bool:
        """Whether it is within the limits; a NaN is not."""
        return self.error <= self.limits[0] and self.worst_row <= self.limits[1] and not self.unexplained

    def count(self, made: Array, wanted: Array) -> None:
        """Take in the rows of a call."""
        a, b = made.astype(np.float64), wanted.astype(np.float64)
        difference, size = np.square(a - b).sum(-1), np.square(b).sum(-1)
        rows = np.sqrt(difference / np.where(size > 0, size, 1))
        # A comparison with NaN is false: it would hide in a maximum.
        worst = float(rows.max(initial=0)) if np.isfinite(rows).all() else float("inf")
        self.worst_row = max(self.worst_row, worst)
        self._squares = self._squares[0] + float(difference.sum()), self._squares[1] + float(size.sum())


@dataclass(frozen=True)
class Comparison:
    """All findings in the order of the programs."""

    findings: tuple[Finding, ...]

    @property
    def first_off(self) -> Finding | None:
        """Where the program first departs from the definition."""
        return next((finding for finding in self.findings if not finding.passed), None)

    @property
    def worst(self) -> Finding:
        """The furthest off, in shares of its limit."""
        return max(self.findings, key=lambda finding: finding.error / finding.limits[0])


def compare_steps(session: RankedSession, reference: FormedWeights, calls: Sequence[Ids]) -> Comparison:
    """Run calls of one sequence through decoder and MTP modules, step by step beside the definition.

    Of what a rank has but a summand, the sum is judged; of what it has some features, those.

    Args:
        session: What is judged.
        reference: What the definition computes with: the same weights in the same forms, whole.
        calls: Token ids of each call: a prompt in chunks, then single tokens, or drafts to verify.
    """
    ranks = range(len(session.ranks))
    one = session.ranks[0]
    graphs = [("decoder", one.decoder), *((f"mtp-{k}", p) for k, p in enumerate(one.mtp))]
    findings: dict[str, list[dict[str, Finding]]] = {name: [{} for _ in ranks] for name, _ in graphs}
    # The definition's caches and each rank's.
    caches: dict[str, list[dict[int, LayerCache]]] = {name: [{} for _ in (-1, *ranks)] for name, _ in graphs}
    past = 0
    for ids in calls:
        carried: Array | None = None
        for module, (graph, program) in enumerate(graphs, start=-1):
            # What the tokens are does not matter to the comparison: modules take the call's own.
            inputs: dict[str, Array] = {"token_ids": ids, "rows": np.arange(len(ids))}
            if carried is not None:
                inputs["carried"] = carried
            wanted, *own = (SequenceBatch((len(ids),), (past,), (cache,)) for cache in caches[graph])
            values = reference_values(one.config, reference, module, inputs, wanted)
            judges = [
                _Judge.of(graph, rank, program, values, reference, findings[graph][rank]) for rank in ranks
            ]
            _run(session, program, inputs, own, judges)
            carried = judges[0].wanted(program.outputs["hidden"])
        past += len(ids)
    in_order = ((graph, name) for graph, by_rank in findings.items() for name in by_rank[0])
    return Comparison(tuple(rank[name] for graph, name in in_order for rank in findings[graph]))


def _run(
    session: RankedSession,
    program: StepProgram,
    inputs: Mapping[str, Array],
    batches: Sequence[SequenceBatch],
    judges: Sequence[_Judge],
) -> None:
    """One call on all ranks."""

    def on(rank: int) -> None:
        session.ranks[rank].executor.run(program, inputs, batches[rank], judges[rank].settle)

    session.meeting.all(on)


def reference_values(
    config: Step35Config,
    weights: FormedWeights,
    module: int,
    inputs: Mapping[str, Array],
    batch: SequenceBatch,
) -> list[Array]:
    """Every value of the definition, inputs first, in the order in which the model asks for them.

    Args:
        config: The model.
        weights: What it computes with.
        module: An MTP module, or -1 for the decoder.
        inputs: The graph's inputs by name, in its order.
        batch: What the tokens are, and their caches.
    """
    given = [to_torch(value) for value in inputs.values()]
    ops = _Recorder(TorchOps(weights, batch), list(given))
    with torch.inference_mode():
        if module < 0:
            model.decoder(ops, config, *given)
        else:
            ids, rows, carried = given
            model.mtp_module(ops, config, module, ids, carried, rows)
    return [to_numpy(value) for value in ops.values]


class _Recorder:
    """The torch dialect, with every activation kept."""

    def __init__(self, ops: TorchOps, values: list[torch.Tensor]) -> None:
        self.ops, self.values = ops, values
        self.vector, self.plus_one = ops.vector, ops.plus_one

    def __getattr__(self, word: str) -> Callable[..., torch.Tensor]:
        def said(*arguments: object) -> torch.Tensor:
            self.values.append(getattr(self.ops, word)(*arguments))
            return self.values[-1]

        return said


@dataclass
class _Judge:
    """Compares what a program's steps make with the definition's `values`, and lets it go on with those."""

    graph: str
    rank: int
    program: StepProgram
    values: list[Array]
    weights: FormedWeights
    findings: dict[str, Finding]
    routers: dict[str, KernelStep]
    sums: frozenset[str]
    buffers: dict[str, Buffer]

    @classmethod
    def of(
        cls,
        graph: str,
        rank: int,
        program: StepProgram,
        values: list[Array],
        weights: FormedWeights,
        findings: dict[str, Finding],
    ) -> _Judge:
        routers = {
            step.inputs[1]: step
            for step in program.steps
            if step.kind == "kernel" and step.call.plugin == "sparse_moe"
        }
        buffers = {buffer.name: buffer for buffer in program.buffers}
        sums = frozenset(
            step.output
            for step in program.steps
            if step.kind == "collective" and step.operation == "all_reduce"
        )
        return cls(graph, rank, program, values, weights, findings, routers, sums, buffers)

    def wanted(self, buffer: str) -> Array:
        """The definition's value of a buffer, or the rank's features of it."""
        found = self.buffers[buffer]
        value = self.values[found.value]
        if found.share == "slice":
            return value[..., self.rank * found.width : (self.rank + 1) * found.width]
        return value

    def settle(self, buffer: Buffer, made: Array) -> Array:
        """See `Executor.run`."""
        if buffer.share == "summand":
            return made
        error, row = TOLERANCES[self.program.activation]
        limits = (SUMMED * error, 2 * row) if buffer.name in self.sums else (error, row)
        new = Finding(self.graph, self.rank, buffer.name, buffer.path, limits)
        finding, wanted = self.findings.setdefault(buffer.name, new), self.wanted(buffer.name)
        finding.count(made, wanted)
        if buffer.name in self.routers:
            turned, counted = self._routing(self.routers[buffer.name], made, wanted)
            finding.flips += int(turned.sum())
            finding.unexplained += int(counted.sum())
        return wanted

    def _routing(
        self, kernel: KernelStep, made: Array, wanted: Array
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        call = kernel.call
        assert call.plugin == "sparse_moe"
        x = np.abs(self.wanted(kernel.inputs[0]).astype(np.float32))
        router = np.abs(self.weights.tensor(f"{call.experts}.gate.weight").numpy())
        # Each feature may be off by its rounding; the sigmoid's slope is 1/4 at most; two scores meet.
        bound = 2 * 0.25 * ROUNDING[self.program.activation] * (x @ router.T).max(-1)
        return routing_flips(made.astype(np.float32), wanted.astype(np.float32), call.top_k, bound)


def routing_flips(
    made: NDArray[np.float32], wanted: NDArray[np.float32], top_k: int, bound: NDArray[np.float32]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Rows in which other experts are chosen, and those of them whose margin is above the bound.

    The margin of a row is how far, by the wanted scores, the best expert that was lost lies above the worst
    that came in its place: what rounding would have had to make up for.

    Args:
        made: `[t, E]` scores.
        wanted: Likewise.
        top_k: Experts chosen.
        bound: `[t]`, how far two scores may move towards each other by rounding.
    """
    mine, theirs = _chosen(made, top_k), _chosen(wanted, top_k)
    lost, gained = theirs & ~mine, mine & ~theirs
    best = np.where(lost, wanted, -np.inf).max(-1)
    worst = np.where(gained, wanted, np.inf).min(-1)
    turned: NDArray[np.bool_] = np.asarray(lost.any(-1))
    margin = np.subtract(best, worst, out=np.zeros_like(best), where=turned)
    return turned, turned & (margin > bound)


def _chosen(scores: NDArray[np.float32], top_k: int) -> NDArray[np.bool_]:
    mask = np.zeros(scores.shape, np.bool_)
    np.put_along_axis(mask, np.argpartition(-scores, top_k - 1, -1)[:, :top_k], True, -1)
    return mask
