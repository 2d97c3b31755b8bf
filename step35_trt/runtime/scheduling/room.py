"""Who gets a place: in a packed step, and in the cache.

In a step: whoever waited `PATIENCE` turns, longest first; then calls that cannot be cut (drafts,
verifications); then prompts, in order of rank, the last one cut to what is left of the step. A running
request is thus served at least once in `PATIENCE` turns and one more for each that is overdue too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from step35_trt.errors import DoesNotFitError

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from step35_trt.runtime.decoding.calls import Needed
    from step35_trt.runtime.scheduling.job import Job
    from step35_trt.runtime.session import Capacity

PATIENCE = 4  # turns


def select(
    jobs: SequenceOf[Job], turn: int, tokens: int, capacity: Capacity
) -> tuple[list[tuple[Job, Needed]], bool]:
    """Who takes part in a step of the graph that all `jobs` wait for.

    Args:
        jobs: Running requests.
        turn: The present turn.
        tokens: Of the step, at most.
        capacity: What the session has room for.

    Returns:
        Each with the tokens it gets, and whether a call that cannot be cut found no page.
    """
    waiting = [(job, job.needed) for job in jobs if job.needed is not None]
    sizes = [len(needed) for _, needed in waiting]
    if sum(sizes) <= tokens and sum(map(capacity.rows_for, sizes)) <= capacity.rows:
        return waiting, False  # there is room for all
    waiting.sort(key=lambda pair: _urgency(pair[0], pair[1], turn))
    pages = capacity.rows // capacity.page_rows
    chosen, stuck = [], False
    for job, needed in waiting:
        size, held = len(needed), capacity.rows_for(job.rows)
        if needed.module is None:  # modules lag behind the decoder, whose pages have room for their rows
            room = held - job.rows + pages * capacity.page_rows
            if size > room and not needed.divisible:
                stuck = True
                continue
            size = min(size, room)
        if needed.divisible:
            size = min(size, tokens)
        if not 0 < size <= tokens:
            continue
        tokens -= size
        if needed.module is None:
            pages -= (capacity.rows_for(job.rows + size) - held) // capacity.page_rows
        chosen.append((job, needed.first(size)))
    return chosen, stuck


def _urgency(job: Job, needed: Needed, turn: int) -> tuple[int, ...]:
    if turn - job.served > PATIENCE:
        return 0, job.served, *job.rank
    if needed.divisible:
        return 2, *job.rank
    return 1, job.served, *job.rank


def fits(job: Job, running: SequenceOf[Job], capacity: Capacity) -> bool:
    """Whether a prompt and a first round fit beside what those that run need for theirs."""
    promised = sum(
        max(capacity.rows_for(other.rows_ahead) - capacity.rows_for(other.rows), 0) for other in running
    )
    return capacity.rows_for(job.rows_ahead) <= capacity.rows - promised


def too_large(job: Job, rows: int) -> DoesNotFitError:
    """What is wrong with a request that does not fit even alone."""
    assert job.generation is not None
    return DoesNotFitError(
        f"A sequence of {job.generation.known_tokens} tokens finds no room in a cache of {rows} rows",
        "Shorten the prompt or the answer, or give the engine more cache.",
    )
