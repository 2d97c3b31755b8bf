"""An answer taken apart while it streams: reasoning, content and tool calls (specification 6).

A call is `<tool_call>`, `<function=NAME>`, per argument `<parameter=KEY>` VALUE `</parameter>`,
`</function>`, `</tool_call>`, each on a line of its own. Every decision hangs on text up to a fixed place
only, so how the stream was cut into pieces never shows. What is no complete call stays content: nothing is
lost but white space between the parts.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

from step35_trt.runtime.dialogue.answer_text import undecided

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

THINK, THOUGHT, CALL, CALLED = "<think>", "</think>", "<tool_call>", "</tool_call>"
_SPACE = " \t\r\n"
_FUNCTION = "<function="
_HEADER_LIMIT = 512  # a model caught in a loop must not hold back its output forever
_HEADER = re.compile(rf"{CALL}[{_SPACE}]*{_FUNCTION}([^<>\n]+)>")
_PARAMETER = re.compile(r"<parameter=([^<>\n]+)>")
_VALUE_END = re.compile(rf"</parameter>(?=[{_SPACE}]*(?:<parameter=|</function>))")
_NAMES = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    dict: "object",
    list: "array",
    type(None): "null",
}
_OPENED_INSIDE = re.compile(r"\n[ \t]*<parameter=[^<>\n]+>[ \t]*(?:\n|$)")
_FUNCTION_END = re.compile(rf"</function>[{_SPACE}]*{CALLED}")


@dataclass(frozen=True)
class ReasoningDelta:
    """More of the reasoning."""

    text: str


@dataclass(frozen=True)
class ContentDelta:
    """More of the answer proper."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """A complete call; `arguments` are typed by the tool's schema."""

    name: str
    arguments: dict[str, Any]


Event = ReasoningDelta | ContentDelta | ToolCall


class AnswerParser:
    """Turns the pieces of one answer into events.

    Args:
        tools: The request's tools. Without any, calls are not looked for.
        in_reasoning: Whether the prompt ended in `<think>`.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]] = (), *, in_reasoning: bool) -> None:
        self._schemas = {t["function"]["name"]: t["function"].get("parameters") or {} for t in tools}
        self._in_reasoning = in_reasoning
        self._started = False
        self._text = ""  # not yet decided
        self._space = ""  # white space that counts only if something follows it
        self._skipped = "\n" if in_reasoning else ""  # characters that do not count before the next piece
        self._searched = 0  # where in _text the search for the end of a call goes on

    def push(self, text: str) -> list[Event]:
        """Take the next piece of the answer."""
        self._text += text
        return self._events(last=False)

    def finish(self) -> list[Event]:
        """The answer is over: what was held back becomes content or reasoning."""
        events = self._events(last=True)
        if not self._in_reasoning and not self._skipped and self._space:
            events.append(ContentDelta(self._space))
        self._space = ""
        return events

    def _events(self, *, last: bool) -> list[Event]:
        events: list[Event] = []
        if not self._started:
            if not last and len(self._text) < len(THINK) and THINK.startswith(self._text):
                return events
            self._started = True
            if self._text.startswith(THINK):  # a template may leave the opening to the model
                self._text, self._in_reasoning, self._skipped = self._text[len(THINK) :], True, "\n"
        if self._in_reasoning:
            self._reasoning(events, last=last)
        if not self._in_reasoning:
            self._content(events, last=last)
        return events

    def _reasoning(self, events: list[Event], *, last: bool) -> None:
        end = self._text.find(THOUGHT)
        sure = end if end >= 0 else len(self._text) if last else undecided(self._text, (THOUGHT,))
        if text := self._visible(self._text[:sure]):
            events.append(ReasoningDelta(text))
        self._text = self._text[sure:]
        if end >= 0:
            self._text = self._text[len(THOUGHT) :]
            self._in_reasoning, self._space, self._skipped = False, "", "\n"

    def _content(self, events: list[Event], *, last: bool) -> None:
        while self._text:
            possible = self._schemas and not (last and CALLED not in self._text)
            start = self._text.find(CALL) if possible else -1
            if start < 0:
                marks = (CALL,) if self._schemas and not last else ()
                start = undecided(self._text, marks)
                self._say(events, start)
                return
            self._say(events, start)
            end = self._call_end(last=last)
            if end is None:
                return
            call = self._call(end) if end else None
            self._searched = 0
            if call is None:
                self._say(events, len(CALL))
            else:
                events.append(call)
                self._text, self._space, self._skipped = self._text[end:], "", _SPACE

    def _say(self, events: list[Event], count: int) -> None:
        if text := self._visible(self._text[:count]):
            events.append(ContentDelta(text))
        self._text = self._text[count:]

    def _visible(self, text: str) -> str:
        """`text` with the white space owed before it and without that which may turn out not to count."""
        if not self._space:
            text = text.lstrip(self._skipped)
        if not (shown := text.rstrip(_SPACE)):
            self._space += text
            return ""
        owed, self._space, self._skipped = self._space, text[len(shown) :], ""
        return owed + shown

    def _call_end(self, *, last: bool) -> int | None:
        """Length of the call `_text` begins with; 0 if it is none, None if that is still open."""
        if not _HEADER.match(self._text, 0, _HEADER_LIMIT):
            if len(self._text) >= _HEADER_LIMIT:
                return 0
            rest = self._text[len(CALL) :].lstrip(_SPACE)
            name = rest.removeprefix(_FUNCTION)
            opened = name != rest and not set("<>\n") & set(name)
            return None if not last and (opened or _FUNCTION.startswith(rest)) else 0
        at = max(len(CALL), self._searched)
        while (at := self._text.find(CALLED, at)) >= 0:
            at += len(CALLED)
            if self._text[: at - len(CALLED)].rstrip(_SPACE).endswith("</function>"):
                return at
        self._searched = max(len(CALL), len(self._text) - len(CALLED))
        return 0 if last else None

    def _call(self, end: int) -> ToolCall | None:
        header = _HEADER.match(self._text)
        assert header is not None
        name, at = header[1].strip(), header.end()
        arguments: dict[str, Any] = {}
        schema = self._schemas.get(name, {})
        while True:
            while self._text[at] in _SPACE:
                at += 1
            if closing := _FUNCTION_END.match(self._text, at):
                return ToolCall(name, arguments) if name and closing.end() == end else None
            if not (opening := _PARAMETER.match(self._text, at)):
                return None
            closing = _VALUE_END.search(self._text, opening.end(), end)
            key = opening[1].strip()
            if closing is None or not key or key in arguments:
                return None
            value = self._text[opening.end() : closing.start()]
            if _OPENED_INSIDE.search(value):  # the end of the one before is missing
                return None
            arguments[key] = typed(
                value.removeprefix("\n").removesuffix("\n"), _property(schema, key), schema
            )
            at = closing.end()


def typed(text: str, schema: object, root: object = None) -> Any:
    """The value of an argument: decoded if the schema asks for another type than string and it is one.

    Args:
        text: What the model wrote.
        schema: JSON schema of the argument; one that says nothing leaves the text as it is.
        root: Schema that `$ref`s of `schema` point into.
    """
    kinds = _kinds(schema, root)
    word = text.strip()
    if "null" in kinds and word in ("null", "None"):
        return None
    if not kinds or "string" in kinds:
        return text
    if "boolean" in kinds and word in (
        "True",
        "False",
    ):  # how templates write them (specification 6, point 6)
        return word == "True"
    try:
        value = from_json(word, allow_inf_nan=False)
        json.dumps(value, allow_nan=False)  # 1e999 is valid JSON that cannot be written again
    except ValueError:
        return text
    if "integer" in kinds and isinstance(value, float) and value.is_integer():
        value = int(value)
    kind = _NAMES[type(value)]
    return value if kind in kinds or (kind == "integer" and "number" in kinds) else text


def _property(schema: object, key: str) -> object:
    properties = schema.get("properties") if isinstance(schema, dict) else None
    return properties.get(key) if isinstance(properties, dict) else None


def _kinds(schema: object, root: object) -> set[str]:
    """The JSON types a schema allows, as far as it says."""
    kinds: set[str] = set()
    seen: set[int] = set()  # references may go round in circles
    nodes = [schema]
    while nodes:
        node = nodes.pop()
        if not isinstance(node, dict) or id(node) in seen:
            continue
        seen.add(id(node))
        declared = node.get("type")
        kinds.update(name for name in _NAMES.values() if name == declared)
        if isinstance(declared, list):
            kinds.update(name for name in _NAMES.values() if name in declared)
        if isinstance(values := node.get("enum"), list) and declared is None:
            kinds.update(_NAMES[type(value)] for value in values)
        for word in ("anyOf", "oneOf", "allOf"):
            nodes += branches if isinstance(branches := node.get(word), list) else []
        if isinstance(target := node.get("$ref"), str) and target.startswith("#/"):
            found = root
            for part in target[2:].split("/"):
                found = found.get(part) if isinstance(found, dict) else None
            nodes.append(found)
    return kinds
