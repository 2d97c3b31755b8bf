from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step35_trt.runtime.dialogue.tool_calls import AnswerParser, ToolCall, typed

SCHEMA = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "share": {"type": "number"},
        "sure": {"type": "boolean"},
        "map": {"type": "object"},
        "list": {"type": "array"},
        "none": {"type": "null"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "unit": {"$ref": "#/$defs/Unit"},
        "loop": {"$ref": "#/$defs/Loop"},
        "free": {},
    },
    "$defs": {"Unit": {"enum": [1, 2]}, "Loop": {"anyOf": [{"$ref": "#/$defs/Loop"}, {"type": "integer"}]}},
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]


@pytest.mark.parametrize(
    ("key", "value", "result"),
    [
        ("text", "5", "5"),
        ("text", "null", "null"),
        ("count", "5", 5),
        ("count", "5.0", 5),
        ("count", " 5 ", 5),
        ("count", "5.5", "5.5"),
        ("count", "five", "five"),
        ("count", "true", "true"),
        ("count", "9" * 30, int("9" * 30)),
        ("share", "5", 5),
        ("share", "-1e-3", -0.001),
        ("share", "NaN", "NaN"),
        ("share", "1e999", "1e999"),
        ("sure", "true", True),
        ("sure", "False", False),
        ("sure", "1", "1"),
        ("map", '{"a": [1, null]}', {"a": [1, None]}),
        ("map", "[1]", "[1]"),
        ("map", "{'a': 1}", "{'a': 1}"),
        ("map", '{"a": 1e999}', '{"a": 1e999}'),
        ("list", "[1, 2]", [1, 2]),
        ("list", "[" * 5000, "[" * 5000),
        ("none", "null", None),
        ("none", "None", None),
        ("maybe", "null", None),
        ("maybe", "5", "5"),
        ("unit", "2", 2),
        ("loop", "3", 3),
        ("free", "5", "5"),
        ("undeclared", "5", "5"),
    ],
)
def test_arguments_are_typed_by_the_schema(key: str, value: str, result: object) -> None:
    parser = AnswerParser(TOOLS, in_reasoning=False)
    (call,) = parser.push(
        f"<tool_call>\n<function=f>\n<parameter={key}>\n{value}\n</parameter>\n</function>\n</tool_call>"
    )
    assert isinstance(call, ToolCall)
    assert call.arguments == {key: result}
    assert type(call.arguments[key]) is type(result)


def test_functions_nobody_declared_keep_their_arguments_as_text() -> None:
    call = "<tool_call>\n<function=h>\n<parameter=count>\n5\n</parameter>\n</function>\n</tool_call>"
    assert AnswerParser(TOOLS, in_reasoning=False).push(call) == [ToolCall("h", {"count": "5"})]


@settings(max_examples=30)
@given(
    st.recursive(st.none() | st.booleans() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x))
)
def test_any_schema_is_survived(schema: object) -> None:
    for wrapped in (schema, {"type": schema}, {"anyOf": schema}, {"enum": schema}, {"$ref": schema}):
        typed("5", wrapped, {"$defs": schema})


def test_wide_circular_schemas_take_no_time() -> None:
    node: dict[str, Any] = {}
    node["anyOf"] = [{"$ref": "#/$defs/a"}] * 200
    started = time.monotonic()
    assert typed("5", node, {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}] * 200}, "b": node}}) == "5"
    assert time.monotonic() - started < 1
