from __future__ import annotations

import json
import time
from itertools import groupby, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step35_trt.runtime.dialogue.tool_calls import AnswerParser, ContentDelta, Event, ReasoningDelta, ToolCall

TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "parameters": {"properties": {"count": {"type": "integer"}}}},
    },
    {"type": "function", "function": {"name": "g"}},
]


def written(name: str, **arguments: str) -> str:
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


def joined(events: list[Event]) -> list[Event]:
    """Neighbouring deltas of a kind as one."""
    result: list[Event] = []
    for kind, group in groupby(events, type):
        events_of_kind = list(group)
        text = "".join(event.text for event in events_of_kind if not isinstance(event, ToolCall))
        result += events_of_kind if kind is ToolCall else [kind(text)]
    return result


def parse(pieces: list[str] | str, *, reasoning: bool = False, tools: Any = TOOLS) -> list[Event]:
    parser = AnswerParser(tools, in_reasoning=reasoning)
    events = [
        event for piece in ([pieces] if isinstance(pieces, str) else pieces) for event in parser.push(piece)
    ]
    return joined(events + parser.finish())


def test_reasoning_content_and_parallel_calls() -> None:
    stream = (
        f"First I think.\n\nThen more.\n</think>\nLet me look.\n\n{written('f', text='a', count='5')}\n"
        f"{written('g')}\n"
    )
    assert parse(stream, reasoning=True) == [
        ReasoningDelta("First I think.\n\nThen more."),
        ContentDelta("Let me look."),
        ToolCall("f", {"text": "a", "count": 5}),
        ToolCall("g", {}),
    ]


def test_events_come_as_soon_as_they_are_certain() -> None:
    parser = AnswerParser(TOOLS, in_reasoning=True)
    assert parser.push("I think") == [ReasoningDelta("I think")]
    assert parser.push(" </thi") == []
    assert parser.push("s") == [ReasoningDelta(" </this")]
    assert parser.push("\n</think>\nDone <") == [ContentDelta("Done")]
    assert parser.push("b> " + written("g")[:-1]) == [ContentDelta(" <b>")]
    assert parser.push(">") == [ToolCall("g", {})]
    assert parser.push("\n\nMore") == [ContentDelta("More")]
    assert joined(parser.push(" <tool_call> is a tag")) == [ContentDelta(" <tool_call> is a tag")]
    assert parser.finish() == []


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        ("never closed \n", [ReasoningDelta("never closed")]),
        ("", []),
        ("</think>", []),
        ("\n</think>\n\nyes\n", [ContentDelta("yes\n")]),
        ("<think>\ntwice\n</think>\nyes", [ReasoningDelta("twice"), ContentDelta("yes")]),
        ("about <tool_call>\n</think>yes", [ReasoningDelta("about <tool_call>"), ContentDelta("yes")]),
        ("a</think>b</think>c", [ReasoningDelta("a"), ContentDelta("b</think>c")]),
    ],
)
def test_where_reasoning_ends(stream: str, events: list[Event]) -> None:
    assert parse(stream, reasoning=True) == events


def test_a_stream_that_opens_reasoning_itself() -> None:
    assert parse("<think>\nhm\n</think>\nyes") == [ReasoningDelta("hm"), ContentDelta("yes")]
    assert parse("<thing>  ") == [ContentDelta("<thing>  ")]


def test_without_tools_a_call_is_text() -> None:
    assert parse(written("f"), tools=[]) == [ContentDelta(written("f"))]


GOOD = written("f", count="5")
BROKEN = [
    "<tool_call>",
    "<tool_call>\n<function=f>\n<parameter=text>\nhalf",
    "<tool_call>\n<function=f>\n</tool_call>",
    "<tool_call>\n</function>\n</tool_call>",
    "<tool_call>\nhello\n</tool_call>",
    "<tool_call>\n<function=>\n</function>\n</tool_call>",
    "<tool_call>\n<function= >\n</function>\n</tool_call>",
    "<tool_call>\n<function=f>\n<parameter=a>\n1\n</function>\n</tool_call>",
    "<tool_call>\n<function=f>\n<parameter=a>\n1\n<parameter=b>\n2\n</parameter>\n</function>\n</tool_call>",
    "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\nstray\n</function>\n</tool_call>",
    "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n<parameter=a>\n2\n</parameter>\n</function>\n</tool_call>",
    "<tool_call>\n<function=f>\nstray\n</function>\n</tool_call>",
    '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
    "<tool_call>" + "\n" * 600 + "<function=f>\n</function>\n</tool_call>",
]


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_calls_become_content_and_hide_no_good_one(broken: str) -> None:
    assert parse(f"before {broken}") == [ContentDelta(f"before {broken}")]
    assert parse(f"{GOOD}{broken}") == [ToolCall("f", {"count": 5}), ContentDelta(broken)]
    if broken.endswith("</tool_call>"):
        assert parse(f"{broken}\n{GOOD}") == [ContentDelta(broken), ToolCall("f", {"count": 5})]


def test_a_call_given_up_and_begun_again() -> None:
    assert parse("<tool_call>\n<function=f>\n" + GOOD) == [
        ContentDelta("<tool_call>\n<function=f>"),
        ToolCall("f", {"count": 5}),
    ]


@pytest.mark.parametrize(
    "value",
    [
        "",
        "\n",
        " indented\n\ttext ",
        "</parameter>",
        "a </tool_call> b",
        "</function>",
        "<parameter=x> inline",
        "<b>&amp;",
    ],
)
def test_values_keep_every_character(value: str) -> None:
    assert parse(written("f", text=value)) == [ToolCall("f", {"text": value})]


def test_values_on_the_line_of_their_tags() -> None:
    inner = "<parameter=count>7</parameter><parameter=text>x</parameter>"
    stream = f"<tool_call><function=f>{inner}</function></tool_call>"
    assert parse(stream) == [ToolCall("f", {"count": 7, "text": "x"})]


FRAGMENTS = st.sampled_from(
    [
        *(
            "<think>",
            "</think>",
            "<tool_call>",
            "</tool_call>",
            "<function=f>",
            "</function>",
            "<function=",
            ">",
            "<",
        ),
        *(
            "<parameter=text>",
            "</parameter>",
            "\n",
            " ",
            "x",
            "5",
            "</",
            "<tool_",
            GOOD,
            written("g"),
            "word. ",
            "\n\n",
        ),
    ]
)


@given(
    st.lists(FRAGMENTS, max_size=14).map("".join), st.lists(st.integers(0, 400), max_size=12), st.booleans()
)
def test_how_the_stream_is_cut_never_shows(stream: str, cuts: list[int], reasoning: bool) -> None:
    edges = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    whole = parse(stream, reasoning=reasoning)
    assert parse([stream[a:b] for a, b in pairwise(edges)], reasoning=reasoning) == whole
    assert parse(list(stream), reasoning=reasoning) == whole


@given(st.lists(FRAGMENTS, max_size=14).map("".join))
def test_nothing_but_white_space_is_lost(stream: str) -> None:
    seen = ""
    for event in parse(stream):
        if isinstance(event, ToolCall):
            seen += f"<tool_call><function={event.name}>"
            seen += "".join(f"<parameter={k}>{v}</parameter>" for k, v in event.arguments.items())
            seen += "</function></tool_call>"
        else:
            seen += event.text
    expected = stream
    if stream.startswith("<think>"):
        expected = stream.removeprefix("<think>").replace("</think>", "", 1)
    assert "".join(seen.split()) == "".join(expected.split())


@given(
    st.dictionaries(st.from_regex(r"\A[a-z_]{1,8}\Z"), st.text(max_size=30), max_size=4), st.text(max_size=30)
)
def test_what_was_written_is_read(arguments: dict[str, str], content: str) -> None:
    tags = ("<tool", "<param", "</param", "</func", "<think", "</think")
    if any(tag in text for tag in tags for text in (*arguments.values(), content)):
        return
    stream = f"why\n</think>\n{content}{written('g', **arguments)}"
    calls = [event for event in parse(stream, reasoning=True) if isinstance(event, ToolCall)]
    assert calls == [ToolCall("g", arguments)]
    json.dumps(calls[0].arguments)


@pytest.mark.parametrize(
    "loop", ["<", "\n", "<tool_call>", "<tool_call>\n<function=a>\n", "<tool_call>\n<function=", "a"]
)
def test_a_model_in_a_loop_is_followed_in_linear_time(loop: str) -> None:
    parser = AnswerParser(TOOLS, in_reasoning=False)
    started = time.monotonic()
    shown = 0
    for event in [e for _ in range(20_000) for e in parser.push(loop)] + parser.finish():
        assert isinstance(event, ContentDelta)
        shown += len(event.text)
    assert shown == 20_000 * len(loop)
    assert time.monotonic() - started < 8
