"""An answer's text while its tokens arrive, ended before a stop string (specification 6)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from step35_trt.errors import UsageError
from step35_trt.runtime.decoding.generate import generate
from step35_trt.runtime.decoding.generation_stats import GenerationStats

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from step35_trt.runtime.decoding.depth import DraftTokens
    from step35_trt.runtime.decoding.sampling import SamplingParams
    from step35_trt.runtime.dialogue.text import Text
    from step35_trt.runtime.session import Session


def undecided(text: str, marks: Iterable[str]) -> int:
    """Where the end of `text` begins that may yet grow into one of `marks`; its length if nowhere."""
    starts = []
    for mark in marks:
        tails = range(max(0, len(text) - len(mark) + 1), len(text))
        starts.append(next((at for at in tails if mark.startswith(text[at:])), len(text)))
    return min(starts, default=len(text))


class StopStrings:
    """Ends a text before the stop string that begins earliest in it.

    Text that may be the beginning of a stop string is held back, so neither a stop string nor a part of one
    is ever returned, however the text is cut into pieces.

    Raises:
        UsageError: a stop string is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise UsageError("a stop string is empty")
        self._stops = tuple(stops)
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """Take the next piece; returns what can no longer be part of a stop string."""
        return self._take(text, last=False)

    def finish(self) -> str:
        """The text is over; returns what was held back."""
        return self._take("", last=True)

    def _take(self, text: str, *, last: bool) -> str:
        if self.hit:
            return ""
        held = self._held + text
        sure = len(held) if last else undecided(held, self._stops)
        found = min((at for stop in self._stops if (at := held.find(stop)) >= 0), default=None)
        if found is not None and found <= sure:
            self.hit, self._held = True, ""
            return held[:found]
        self._held = held[sure:]
        return held[:sure]


class AnswerText:
    """One answer's text while its tokens arrive: decoded, and ended before a stop string.

    Attributes:
        counted: Tokens that count: up to the one that made a stop string certain.

    Raises:
        UsageError: a stop string is empty.
    """

    def __init__(self, text: Text, stop_strings: Sequence[str] = ()) -> None:
        self._detokenizer = text.detokenizer()
        self._stops = StopStrings(stop_strings)
        self.counted = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the answer; further tokens are ignored."""
        return self._stops.hit

    def push(self, token_ids: Iterable[int]) -> str:
        """Take the next tokens; returns the text that is now certain."""
        pieces = []
        for token_id in token_ids:
            if self.stopped:
                break
            self.counted += 1
            pieces.append(self._stops.push(self._detokenizer.push(token_id)))
        return "".join(pieces)

    def finish(self) -> str:
        """There are no more tokens; returns what was held back."""
        return self._stops.push(self._detokenizer.finish()) + self._stops.finish()


def complete(
    session: Session,
    text: Text,
    prompt_ids: Sequence[int],
    sampling: SamplingParams,
    *,
    max_tokens: int,
    stop_ids: Collection[int] = (),
    stop_strings: Sequence[str] = (),
    draft_tokens: DraftTokens = "auto",
    stats: GenerationStats | None = None,
    token_ids: list[int] | None = None,
) -> Iterator[str]:
    """Continue `prompt_ids`, yielding the answer's text in pieces as soon as it is certain.

    Args:
        session: The loaded bundle.
        text: Its tokenizer.
        prompt_ids: Not empty; see `Text.encode`.
        sampling: How the next token is chosen.
        max_tokens: At most so many tokens are generated.
        stop_ids: Ids that end the answer and are no part of it.
        stop_strings: Texts that do the same.
        draft_tokens: Drafts per round, see `generate`.
        stats: Filled in; where a stop string ends the answer, the reason is `stop` and the tokens are
            counted up to the one that made it certain.
        token_ids: Filled with the tokens that are counted.

    Raises:
        UsageError: an argument is off.
        DoesNotFitError: the context has no room for the prompt and an answer.
        VerificationError: from the iterator, when the model's logits are not finite.
    """
    stats = GenerationStats() if stats is None else stats
    answer = AnswerText(text, stop_strings)
    chunks = generate(
        session,
        prompt_ids,
        sampling,
        max_tokens=max_tokens,
        stop_ids=stop_ids,
        draft_tokens=draft_tokens,
        stats=stats,
    )
    return _pieces(chunks, answer, stats, [] if token_ids is None else token_ids)


def _pieces(
    chunks: Iterator[list[int]], answer: AnswerText, stats: GenerationStats, taken: list[int]
) -> Iterator[str]:
    for chunk in chunks:
        before = answer.counted
        piece = answer.push(chunk)
        taken += chunk[: answer.counted - before]
        if answer.stopped:
            stats.finish_reason, stats.generated_tokens = "stop", answer.counted
        if piece:
            yield piece
        if answer.stopped:
            return
    rest = answer.finish()
    if answer.stopped:
        stats.finish_reason = "stop"
    if rest:
        yield rest
