"""A chat at the terminal."""

from __future__ import annotations

import sys
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

from step35_trt import console
from step35_trt.errors import Step35Error
from step35_trt.runtime.decoding.generation_stats import GenerationStats
from step35_trt.runtime.dialogue.chat import ChatTemplate, Message, starts_in_reasoning
from step35_trt.runtime.dialogue.tool_calls import AnswerParser, ContentDelta, ReasoningDelta, ToolCall
from step35_trt.runtime.scheduling.requests import Limits
from step35_trt.runtime.scheduling.serving import ServingLoop
from step35_trt.runtime.scheduling.through_loop import complete_through

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator
    from typing import Literal

    from step35_trt.runtime.decoding.sampling import SamplingParams
    from step35_trt.runtime.dialogue.text import Text
    from step35_trt.runtime.session import Session


def chat(
    session: Session,
    text: Text,
    sampling: SamplingParams,
    *,
    max_tokens: int,
    stop_strings: tuple[str, ...],
    draft_tokens: int | Literal["auto"],
) -> None:
    """Talk until the input ends. Ctrl-C stops an answer, which then stands in the history as far as it came.

    The loop runs on a thread of its own, so an interrupt never hits a step half-way.

    Raises:
        UsageError: the bundle has no chat template.
    """
    template = ChatTemplate.of(text)
    history: list[Message] = []
    with ServingLoop(session, Limits(sequences=1)) as loop:

        def complete(prompt_ids: list[int], stats: GenerationStats) -> Generator[str]:
            return complete_through(
                loop,
                text,
                prompt_ids,
                sampling,
                max_tokens=max_tokens,
                stop_ids=session.config.eos_token_id,
                stop_strings=stop_strings,
                draft_tokens=draft_tokens,
                stats=stats,
            )

        console.say("Ctrl-C stops an answer, Ctrl-D ends the chat.")
        for said in _questions():
            history.append(Message(role="user", content=said))
            prompt = template.render(history)
            try:
                answer = _show(partial(complete, text.encode(prompt)), starts_in_reasoning(prompt))
            except Step35Error as error:  # of this question; another, shorter one may do
                history.pop()
                console.fail(error.message, error.hint)
                continue
            history.append(answer)


def _questions() -> Iterator[str]:
    while True:
        try:
            said = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            console.say("\nCtrl-D ends the chat.")
            continue
        if said.strip():
            yield said


def _show(complete: Callable[[GenerationStats], Generator[str]], reasoning: bool) -> Message:
    """Print an answer while it comes, reasoning dimmed; returns what there is of it."""
    parser = AnswerParser((), in_reasoning=reasoning)
    stats = GenerationStats()
    said = {ReasoningDelta: "", ContentDelta: ""}
    remark = ""
    try:
        with closing(complete(stats)) as pieces:
            for event in _each(parser, pieces):
                _print(event, first=not said[type(event)], after_reasoning=bool(said[ReasoningDelta]))
                said[type(event)] += event.text
        remark = f"{stats.generated_tokens} tokens, {stats.tokens_per_second:.1f} tokens/s"
    except KeyboardInterrupt:
        remark = "stopped"
    finally:
        console.out.print()
    console.say(remark)
    return Message(
        role="assistant", content=said[ContentDelta], reasoning_content=said[ReasoningDelta] or None
    )


def _each(parser: AnswerParser, pieces: Iterable[str]) -> Iterator[ReasoningDelta | ContentDelta]:
    """The events; without tools there are no calls among them."""
    for piece in pieces:
        yield from (event for event in parser.push(piece) if not isinstance(event, ToolCall))
    yield from (event for event in parser.finish() if not isinstance(event, ToolCall))


def _print(event: ReasoningDelta | ContentDelta, *, first: bool, after_reasoning: bool) -> None:
    content = isinstance(event, ContentDelta)
    # A model may write what a terminal takes for commands.
    shown = "".join(char for char in event.text if char.isprintable() or char in "\n\t")
    if content and first and after_reasoning:
        shown = "\n\n" + shown
    console.out.print(shown, style=None if content else "dim", end="", markup=False, highlight=False)
