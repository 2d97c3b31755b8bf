"""Completions through a serving loop: callers wait, each on a thread of its own, and run together."""

from __future__ import annotations

from queue import SimpleQueue
from typing import TYPE_CHECKING

from step35_trt.errors import Step35Error
from step35_trt.runtime.dialogue.answer_text import AnswerText
from step35_trt.runtime.scheduling.requests import Failed, TokenRequest, Tokens

if TYPE_CHECKING:
    from collections.abc import Collection, Generator, Sequence
    from typing import Literal

    from step35_trt.runtime.decoding.generation_stats import GenerationStats
    from step35_trt.runtime.decoding.sampling import SamplingParams
    from step35_trt.runtime.dialogue.text import Text
    from step35_trt.runtime.scheduling.requests import Event
    from step35_trt.runtime.scheduling.serving import ServingLoop


def complete_through(
    loop: ServingLoop,
    text: Text,
    prompt_ids: Sequence[int],
    sampling: SamplingParams,
    *,
    max_tokens: int,
    stop_ids: Collection[int],
    stop_strings: Sequence[str],
    draft_tokens: int | Literal["auto"],
    stats: GenerationStats,
) -> Generator[str]:
    """What `complete` does, beside other requests. Dropping the iterator cancels the request.

    Args:
        loop: Runs the request.
        text: See `complete`, also for the others.
        prompt_ids: Not empty.
        sampling: How the next token is chosen.
        max_tokens: At most so many tokens are generated.
        stop_ids: Ids that end the answer.
        stop_strings: Texts that end the answer.
        draft_tokens: Drafts a round.
        stats: Filled in when the answer is over.

    Raises:
        Step35Error: from the iterator: the request's own error, or the loop has been stopped.
    """
    answer = AnswerText(text, stop_strings)
    events: SimpleQueue[Event] = SimpleQueue()
    request = TokenRequest(prompt_ids, max_tokens, sampling, stop_ids, draft_tokens)
    handle = loop.submit(request, events.put)
    try:
        while isinstance(event := events.get(), Tokens):
            if piece := answer.push(event.token_ids):
                yield piece
            if answer.stopped:
                handle.cancel()
        if isinstance(event, Failed):
            raise event.error
        rest = answer.finish()
        vars(stats).update(vars(event.stats))
        if answer.stopped:
            stats.finish_reason, stats.generated_tokens = "stop", answer.counted
        elif event.reason not in ("stop", "length"):
            raise Step35Error(f"the request was ended before its answer was complete ({event.reason})")
        if rest:
            yield rest
    finally:
        handle.cancel()
