"""How far a scheduler's requests draft: chosen among those that share a step, from what such steps cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from step35_trt.runtime.decoding.round_costs import RoundCosts, StepwiseCosts, prior_cost
from step35_trt.runtime.decoding.rounds import together
from step35_trt.runtime.scheduling.batch_depth import BatchDepth

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from step35_trt.runtime.decoding.calls import Graph, Needed
    from step35_trt.runtime.scheduling.batch_depth import Member
    from step35_trt.runtime.scheduling.job import Job
    from step35_trt.runtime.scheduling.requests import TokenRequest
    from step35_trt.runtime.session import Session


class TurnDepths:
    """The depths of rounds that are run at once, and of those that are run step by step beside prompts.

    Args:
        session: Which of the two it has.
        tokens: Of a packed step, at most.
    """

    def __init__(self, session: Session, tokens: int) -> None:
        heads, prior = session.config.num_nextn_predict_layers, prior_cost(session.config)
        self._session, self._tokens = session, tokens
        self._step_costs, self._round_costs = StepwiseCosts(heads, prior), RoundCosts(heads, prior)
        self._steps, self._rounds = BatchDepth(heads, self._step_costs), BatchDepth(heads, self._round_costs)

    def member(self, request: TokenRequest) -> Member | None:
        """A request's share in the choice; None where it has made its own."""
        if request.draft_tokens != "auto":
            return None
        return (self._rounds if together(self._session, request.sampling) else self._steps).member()

    def record(self, graph: Graph, tokens: SequenceOf[int], seconds: float) -> None:
        """A packed step of so many tokens of each sequence took so long."""
        if graph == "round":
            self._round_costs.record(sum(tokens), max(tokens) - 1, seconds)
        else:
            self._step_costs.of(graph).record(sum(tokens), seconds)

    def choose(self, graph: Graph, running: SequenceOf[Job], served: SequenceOf[tuple[Job, Needed]]) -> None:
        """Set the depths of the next round of those that a step has verified.

        Args:
            graph: The decoder, or rounds.
            running: All requests that run.
            served: Those that the step was for, with what they got.
        """
        members, others = [], 0
        calls = {id(job): needed for job, needed in served}
        for job in running:
            assert job.needed is not None
            assert job.generation is not None
            needed = calls.get(id(job))
            left = len(job.needed) if needed is None else len(job.needed) - len(needed)
            prompt = job.needed.module is None and job.needed.divisible and left > 0
            if prompt and graph is None:
                others += left
            elif prompt or job.generation.at_once != (graph == "round"):
                continue  # runs in another step than those for whom is chosen
            elif needed is not None and job.member is not None:
                members.append(job.member)
            else:
                others += job.generation.round_tokens
        chooser = self._rounds if graph == "round" else self._steps
        chooser.choose(members, min(others, self._tokens))
