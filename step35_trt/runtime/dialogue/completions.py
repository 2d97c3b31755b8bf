"""OpenAI's completions and chat completions: one request in, one answer out."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import to_json

from step35_trt.errors import UsageError
from step35_trt.runtime.decoding.generation_stats import GenerationStats
from step35_trt.runtime.decoding.sampling import SamplingParams
from step35_trt.runtime.dialogue.answer_text import complete
from step35_trt.runtime.dialogue.chat import (
    ChatTemplate,
    explain,
    parse_messages,
    parse_tools,
    starts_in_reasoning,
)
from step35_trt.runtime.dialogue.tool_calls import AnswerParser, ContentDelta, ReasoningDelta, ToolCall

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from step35_trt.runtime.decoding.depth import DraftTokens
    from step35_trt.runtime.dialogue.text import Text
    from step35_trt.runtime.dialogue.tool_calls import Event
    from step35_trt.runtime.session import Session

    Completing = Callable[..., Iterator[str]]  # `complete` without its session

COMPLETION_TOKENS = 16  # what OpenAI's completions generate when max_tokens is absent
_MODEL = "step-3.5-flash"

# Fields that cannot change an answer.
_INERT = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention "
    "stream_options priority request_id".split()
)
# Fields that are refused unless they ask for what happens anyway.
_NEUTRAL: dict[str, Any] = {
    "n": 1,
    "best_of": 1,
    "stream": False,
    "echo": False,
    "logprobs": False,
    "top_logprobs": 0,
    "logit_bias": {},
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
    "min_tokens": 0,
    "ignore_eos": False,
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "modalities": ["text"],
}


class Body(BaseModel):
    """The `body` of a request; what is not there takes `SamplingParams`' value.

    `prompt` is a text or a list of token ids, `messages` a chat; there is exactly one of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    model: str = _MODEL
    messages: list[Any] | None = None
    prompt: Any = None
    max_tokens: int | None = Field(default=None, gt=0)
    max_completion_tokens: int | None = Field(default=None, gt=0)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: list[str] = []
    tools: list[Any] = []
    tool_choice: str = "auto"

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_done(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        known = {key: item for key, item in value.items() if item is not None and key not in _INERT}
        for key, neutral in _NEUTRAL.items():
            # A truth value is no number here: logprobs 0 asks for something, logprobs false does not.
            given = known.pop(key, neutral)
            if given != neutral or isinstance(given, bool) != isinstance(neutral, bool):
                raise ValueError(f"{key} {_shown(given)} is not supported, only {_shown(neutral)}")
        return known

    @field_validator("prompt")
    @classmethod
    def _text_or_ids(cls, value: Any) -> Any:
        ids = isinstance(value, list) and value and all(type(item) is int for item in value)
        if not (ids or isinstance(value, str)):
            raise ValueError("a prompt is one text or a list of token ids that is not empty")
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _free_choice(cls, value: Any) -> Any:
        if value not in ("auto", "none"):
            raise ValueError(f"{_shown(value)} is not supported, only auto and none")
        return value

    @model_validator(mode="after")
    def _one_input(self) -> Body:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("a request has either messages or a prompt")
        if self.prompt is not None and self.tools:
            raise ValueError("tools need messages, not a prompt")
        return self

    @property
    def sampling(self) -> SamplingParams:
        """The sampling fields.

        Raises:
            UsageError: one is out of range.
        """
        given = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "min_p", "seed")}
        if given["top_k"] == -1:  # off, as other servers spell it
            given["top_k"] = 0
        return replace(
            SamplingParams(), **{name: value for name, value in given.items() if value is not None}
        )


def parse_body(raw: Mapping[str, Any]) -> Body:
    """Check the body of a request.

    Raises:
        UsageError: naming the field.
    """
    try:
        return Body.model_validate(raw)
    except ValidationError as error:
        raise explain(error) from None


def prompt_of(
    text: Text, template: ChatTemplate | None, body: Body
) -> tuple[list[int], list[dict[str, Any]], bool]:
    """What a request has the model continue.

    Returns:
        Token ids, the tools it may call, and whether the prompt ends inside its reasoning.

    Raises:
        UsageError: there are messages and no template, or one of them is off.
    """
    tools = parse_tools(body.tools) if body.tool_choice == "auto" else []
    if body.messages is None:
        ids = text.encode(body.prompt) if isinstance(body.prompt, str) else body.prompt
        return ids, tools, False
    if template is None:
        raise UsageError("this model has no chat template: send a prompt instead of messages")
    prompt = template.render(parse_messages(body.messages), tools)
    return text.encode(prompt), tools, starts_in_reasoning(prompt)


def answer(
    session: Session,
    text: Text,
    template: ChatTemplate | None,
    body: Body,
    tag: str,
    *,
    draft_tokens: DraftTokens = "auto",
    completing: Completing | None = None,
) -> dict[str, Any]:
    """Answer one request.

    Args:
        session: The loaded bundle.
        text: Its tokenizer.
        template: Its chat template, if it has one.
        body: The request.
        tag: Makes the ids in the answer; the same tag makes the same ids.
        draft_tokens: Drafts per round, see `generate`.
        completing: What continues a prompt in the place of `complete`, with the same arguments save the
            session.

    Returns:
        A `chat.completion` or `text_completion` object; `created` is 0, so that answers can be repeated.

    Raises:
        UsageError: a field is off.
        DoesNotFitError: the context has no room for the prompt and an answer.
    """
    prompt_ids, tools, reasoning = prompt_of(text, template, body)
    stats = GenerationStats()
    pieces = (completing or partial(complete, session))(
        text,
        prompt_ids,
        body.sampling,
        max_tokens=_max_tokens(body, session),
        stop_ids=session.config.eos_token_id,
        stop_strings=body.stop,
        draft_tokens=draft_tokens,
        stats=stats,
    )
    choice: dict[str, Any] = {"index": 0, "logprobs": None}
    if body.messages is None:
        choice |= {"text": "".join(pieces), "finish_reason": stats.finish_reason}
    else:
        choice["message"] = message = _message(_events(pieces, tools, reasoning), tag)
        choice["finish_reason"] = (
            "tool_calls"
            if message.get("tool_calls") and stats.finish_reason == "stop"
            else stats.finish_reason
        )
    return {
        "id": f"{'cmpl' if body.messages is None else 'chatcmpl'}-{tag}",
        "object": "text_completion" if body.messages is None else "chat.completion",
        "created": 0,
        "model": body.model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": stats.prompt_tokens,
            "completion_tokens": stats.generated_tokens,
            "total_tokens": stats.prompt_tokens + stats.generated_tokens,
        },
    }


def _max_tokens(body: Body, session: Session) -> int:
    given = body.max_completion_tokens or body.max_tokens
    return given or (COMPLETION_TOKENS if body.messages is None else session.max_tokens)


def _events(pieces: Iterable[str], tools: Sequence[Mapping[str, Any]], reasoning: bool) -> list[Event]:
    parser = AnswerParser(tools, in_reasoning=reasoning)
    events = [event for piece in pieces for event in parser.push(piece)]
    return events + parser.finish()


def _message(events: Sequence[Event], tag: str) -> dict[str, Any]:
    content = "".join(event.text for event in events if isinstance(event, ContentDelta))
    thoughts = "".join(event.text for event in events if isinstance(event, ReasoningDelta))
    calls = [event for event in events if isinstance(event, ToolCall)]
    message: dict[str, Any] = {"role": "assistant", "content": None if calls and not content else content}
    if thoughts:
        message["reasoning_content"] = thoughts
    if calls:
        message["tool_calls"] = [
            {
                "id": f"call_{tag}_{index}",
                "type": "function",
                "function": {"name": call.name, "arguments": to_json(call.arguments).decode()},
            }
            for index, call in enumerate(calls)
        ]
    return message


def _shown(value: object) -> str:
    return to_json(value).decode()[:80]
