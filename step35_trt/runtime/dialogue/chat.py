"""Chat messages in: validated like OpenAI's, rendered by the checkpoint's own template (specification 6)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import from_json

from step35_trt.errors import CorruptInputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from step35_trt.runtime.dialogue.text import Text

_SHAPE = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class CalledFunction(BaseModel):
    """A call in the history; `arguments` may come as the JSON text that OpenAI sends."""

    model_config = _SHAPE
    name: str = Field(min_length=1)
    arguments: dict[str, Any] = {}

    @field_validator("arguments", mode="before")
    @classmethod
    def _decoded(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            value = from_json(value or "{}", allow_inf_nan=False)
        except ValueError as error:
            raise ValueError(f"arguments are not valid JSON: {error}") from None
        if not isinstance(value, dict):
            raise ValueError("arguments are not a JSON object")
        return value


class CalledTool(BaseModel):
    """One entry of an assistant message's `tool_calls`."""

    model_config = _SHAPE
    id: str | None = None
    index: int | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(BaseModel):
    """One message of a chat; text parts of its content are joined, `developer` is another `system`."""

    model_config = _SHAPE
    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    name: str | None = None
    reasoning_content: str | None = Field(
        default=None, validation_alias=AliasChoices("reasoning_content", "reasoning")
    )
    tool_calls: list[CalledTool] = []
    tool_call_id: str | None = None

    @field_validator("role", mode="before")
    @classmethod
    def _renamed(cls, value: Any) -> Any:
        return "system" if value == "developer" else value

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, value: Any) -> Any:
        if value is None:
            return ""
        return "".join(map(_part, value)) if isinstance(value, list) else value

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        # Clients send back what they received, and answers are full of nulls and empty lists.
        if not isinstance(value, dict):
            return value
        return {key: item for key, item in value.items() if item is not None and item != []}

    @model_validator(mode="after")
    def _belongs(self) -> Message:
        if self.role != "assistant" and (self.tool_calls or self.reasoning_content):
            raise ValueError("only an assistant message has tool_calls or reasoning_content")
        return self


class DeclaredFunction(BaseModel):
    """What a model is told about a function; `parameters` is a JSON schema."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)
    name: str = Field(min_length=1, pattern=r"^[^<>\n]+$")
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    """One entry of a request's `tools`."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)
    type: Literal["function"]
    function: DeclaredFunction


_MESSAGES = TypeAdapter(list[Message])
_TOOLS = TypeAdapter(list[Tool])


def explain(error: ValidationError, name: str = "") -> UsageError:
    """The first complaint of pydantic as one sentence that names the field.

    Args:
        error: What validation raised.
        name: Where the value came from, such as `messages`.
    """
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in ((name,) if name else ()) + first["loc"])
    complaint = "this field is not supported" if first["type"] == "extra_forbidden" else first["msg"]
    return UsageError(f"{where + ': ' if where else ''}{complaint.removeprefix('Value error, ')}")


def parse_messages(raw: object) -> list[Message]:
    """Check the `messages` of a request.

    Raises:
        UsageError: naming the message and the field.
    """
    try:
        messages = _MESSAGES.validate_python(raw)
    except ValidationError as error:
        raise explain(error, "messages") from None
    if not messages:
        raise UsageError("messages: there is none")
    return messages


def parse_tools(raw: object) -> list[dict[str, Any]]:
    """Check the `tools` of a request; they are returned as sent, since the model reads them in that order.

    Raises:
        UsageError: naming the tool and the field.
    """
    try:
        _TOOLS.validate_python(raw)
    except ValidationError as error:
        raise explain(error, "tools") from None
    assert isinstance(raw, list)
    return raw


@dataclass(frozen=True)
class ChatTemplate:
    """The checkpoint's chat template, compiled; it runs in a sandbox, since checkpoints come from anywhere.

    Attributes:
        template: The compiled template.
        special_tokens: Texts the template may name, such as `bos_token`.
    """

    template: jinja2.Template
    special_tokens: Mapping[str, str]

    @classmethod
    def of(cls, text: Text) -> ChatTemplate:
        """Compile the template that came with a tokenizer.

        Raises:
            UsageError: there is none.
            CorruptInputError: it is not valid Jinja.
        """
        if text.chat_template is None:
            raise UsageError("this model has no chat template", "Send a prompt instead of messages.")
        return cls.compile(text.chat_template, text.special_tokens)

    @classmethod
    def compile(cls, source: str, special_tokens: Mapping[str, str]) -> ChatTemplate:
        """Compile `source` with the helpers that templates on the Hugging Face hub rely on.

        Raises:
            CorruptInputError: it is not valid Jinja.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            return cls(environment.from_string(source), special_tokens)
        except (jinja2.TemplateError, RecursionError) as error:
            raise CorruptInputError(f"the chat template is not valid Jinja: {error}") from None

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt for `messages`, ending where the assistant's answer begins.

        Raises:
            UsageError: the template rejects the conversation.
        """
        try:
            return self.template.render(
                dict(self.special_tokens),
                messages=[_for_template(message) for message in messages],
                tools=list(tools) or None,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template is foreign code and can fail in any way
            reason = str(error) or type(error).__name__
            raise UsageError(f"the chat template rejects these messages: {reason}") from None


def starts_in_reasoning(prompt: str) -> bool:
    """Whether the answer to a rendered prompt begins inside `<think>` (specification 6, point 8)."""
    return prompt.rstrip().endswith("<think>")


def _part(part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise ValueError("a content part is no object with a type")
    if kind != "text":
        raise ValueError(f"content of type {kind} is not supported, only text")
    if not isinstance(text := part.get("text"), str):
        raise ValueError("a text part has no text")
    return text


def _for_template(message: Message) -> dict[str, Any]:
    """Templates test for presence, so only what was sent goes in; content always does, as a string."""
    shape: dict[str, Any] = {"role": message.role, "content": message.content}
    for key in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, key)) is not None:
            shape[key] = value
    if message.tool_calls:
        shape["tool_calls"] = [call.model_dump(exclude={"index"}) for call in message.tool_calls]
    return shape


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)
