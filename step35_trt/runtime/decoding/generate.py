"""One answer from prompt to finish, as an iterator of its tokens."""

from __future__ import annotations

import time
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from step35_trt.runtime.decoding.calls import drive
from step35_trt.runtime.decoding.generation import Generation

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from collections.abc import Sequence as SequenceOf

    from step35_trt.runtime.decoding.depth import DraftTokens
    from step35_trt.runtime.decoding.generation import Clock
    from step35_trt.runtime.decoding.generation_stats import GenerationStats
    from step35_trt.runtime.decoding.sampling import SamplingParams
    from step35_trt.runtime.session import Ids, Session


def generate(
    session: Session,
    prompt_ids: SequenceOf[int] | Ids,
    sampling: SamplingParams,
    *,
    max_tokens: int,
    stop_ids: Collection[int] = (),
    draft_tokens: DraftTokens = "auto",
    stats: GenerationStats | None = None,
    clock: Clock = time.perf_counter,
) -> Iterator[list[int]]:
    """Complete a prompt, yielding the new token ids of each round as soon as they are certain.

    The arguments are checked by the call itself, before the first token is asked for. The iterator can be
    dropped or closed at any time; the session serves other sequences as before.

    Args:
        session: A loaded bundle.
        prompt_ids: Token ids, at least one.
        sampling: Filters and seed. A seed repeats the answer for the same `draft_tokens`; with 'auto' the
            depth then follows from acceptance and assumed costs, as measured ones differ from run to run.
        max_tokens: Tokens to generate at most; the context limit may end the answer earlier.
        stop_ids: Ids that end the answer; they are not given out.
        draft_tokens: Drafts per round, 0 .. number of MTP modules, fewer where a call takes too few tokens to
            verify them; 'auto' adapts, and a `DepthPolicy` goes on with what it learned in earlier calls
            (one at a time; seeded sampling ignores it). The answer's distribution (greedy: the answer) does
            not depend on it. With 0 the MTP modules never run.
        stats: Filled while running, if given.
        clock: Seconds, monotonic.

    Raises:
        UsageError: an argument is off.
        DoesNotFitError: the context has no room for the prompt and an answer.
        VerificationError: from the iterator, when the model's logits are not finite.
    """
    watch = _Stopwatch(clock)
    generation = Generation(
        session,
        prompt_ids,
        sampling,
        max_tokens=max_tokens,
        stop_ids=stop_ids,
        draft_tokens=draft_tokens,
        stats=stats,
        clock=watch,
    )
    return _parts(session, generation, watch)


def _parts(session: Session, generation: Generation, watch: _Stopwatch) -> Iterator[list[int]]:
    with closing(drive(session, generation.calls())) as steps:
        for _ in steps:
            if new := generation.take():
                with watch.stopped():
                    yield new


class _Stopwatch:
    """A clock that can be stopped: what the caller of an iterator does between two of its values."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lost = 0.0

    def __call__(self) -> float:
        return self._clock() - self._lost

    @contextmanager
    def stopped(self) -> Iterator[None]:
        at = self._clock()
        yield
        self._lost += self._clock() - at
