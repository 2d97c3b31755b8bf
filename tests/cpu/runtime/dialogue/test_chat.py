from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import step35_trt.nano
from step35_trt.errors import CorruptInputError, UsageError
from step35_trt.runtime.dialogue.chat import ChatTemplate, parse_messages, parse_tools, starts_in_reasoning
from step35_trt.runtime.dialogue.text import Text
from tests.texts import write_tokenizer

SOURCE = (Path(step35_trt.nano.__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")
NANO = ChatTemplate.compile(SOURCE, {"bos_token": "<BOS>"})
WEATHER = {
    "type": "function",
    "function": {"name": "wetter", "description": "Wie heiß?", "parameters": {"type": "object"}},
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any = None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content} | fields


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}


def render(messages: list[dict[str, Any]], tools: Any = (), prompt: bool = False) -> str:
    return NANO.render(parse_messages(messages), tools, add_generation_prompt=prompt)


def turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


# Specification 6, points 1 to 8.


def test_bos_then_turns_then_the_opened_answer() -> None:
    rendered = render([user("Hi")], prompt=True)
    assert rendered == "<BOS>" + turn("user", "Hi") + "<|im_start|>assistant\n<think>\n"
    assert starts_in_reasoning(rendered)
    assert not starts_in_reasoning(render([user("Hi")]))


def test_system_alone() -> None:
    assert render([{"role": "system", "content": "Be brief."}, user("Hi")]) == (
        "<BOS>" + turn("system", "Be brief.") + turn("user", "Hi")
    )


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_tools_make_one_system_block(system: str | None) -> None:
    messages = [{"role": "system", "content": system}] if system else []
    rendered = render([*messages, user("Hi")], [WEATHER, CLOCK])
    opening = "<BOS><|im_start|>system\n" + (f"{system}\n\n" if system else "") + "# Tools\n\n"
    assert rendered.startswith(opening)
    block, rest = rendered.removeprefix(opening).split("<|im_end|>\n", 1)
    assert rest == turn("user", "Hi")
    announced, listed = block.split("<tools>\n")
    assert "JSONSchema" in announced
    listed, instruction = listed.split("\n</tools>\n")
    assert [json.loads(line) for line in listed.split("\n")] == [WEATHER, CLOCK]
    assert "heiß" in listed  # kept, not escaped
    assert "<tool_call>\n<function=" in instruction
    assert ">\n</parameter>" not in instruction
    assert "\n</parameter>\n</function>\n</tool_call>" in instruction
    assert instruction.endswith("</IMPORTANT>")
    assert "<IMPORTANT>\n" in instruction


def test_later_system_messages_and_observations() -> None:
    messages = [
        user("a"),
        {"role": "system", "content": "b"},
        {"role": "system", "name": "observation", "content": "c"},
    ]
    assert render(messages) == "<BOS>" + turn("user", "a") + turn("system", "b") + turn("observation", "c")


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render([user(parts)]) == "<BOS>" + turn("user", "ab")


def test_the_template_itself_reads_parts_too() -> None:
    shown = NANO.template.render(
        bos_token="",
        messages=[{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}],
    )
    assert shown == turn("user", "a<im_patch>")


def test_reasoning_before_the_last_query_is_dropped() -> None:
    messages = [
        user("one"),
        assistant("first", reasoning_content="why"),
        assistant("<think>\nwhy\n</think>\n\nsecond"),
        user("two"),
        assistant("third", reasoning_content="because\n"),
        assistant("<think>\nso\n</think>\nfourth"),
    ]
    assert render(messages) == (
        "<BOS>"
        + turn("user", "one")
        + turn("assistant", "first")
        + turn("assistant", "second")
        + turn("user", "two")
        + turn("assistant", "<think>\nbecause\n</think>\nthird")
        + turn("assistant", "<think>\nso\n</think>\nfourth")
    )


def test_a_tool_response_from_the_user_is_no_query() -> None:
    messages = [
        user("one"),
        assistant("a", reasoning_content="kept"),
        user("<tool_response>x</tool_response>"),
    ]
    assert "kept" in render(messages)
    messages[-1] = user("so: <tool_response>x</tool_response>")
    assert "kept" not in render(messages)


@pytest.mark.parametrize("as_text", [False, True])
def test_calls_follow_the_content(as_text: bool) -> None:
    arguments = {
        "city": "Köln",
        "days": 3,
        "units": ["°C", "mm"],
        "opts": {"é": 1},
        "exact": True,
        "none": None,
    }
    sent = json.dumps(arguments) if as_text else arguments
    messages = [user("one"), assistant("Let me see.", tool_calls=[call("wetter", sent), call("clock", "{}")])]
    assert render(messages) == "<BOS>" + turn("user", "one") + turn(
        "assistant",
        "<think>\n\n</think>\nLet me see.<tool_call>\n<function=wetter>\n"
        "<parameter=city>\nKöln\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        '<parameter=units>\n["°C", "mm"]\n</parameter>\n<parameter=opts>\n{"é": 1}\n</parameter>\n'
        "<parameter=exact>\nTrue\n</parameter>\n<parameter=none>\nNone\n</parameter>\n"
        "</function>\n</tool_call><tool_call>\n<function=clock>\n</function>\n</tool_call>",
    )


def test_consecutive_tool_messages_share_a_block() -> None:
    def tool(content: str) -> dict[str, Any]:
        return {"role": "tool", "tool_call_id": "c1", "content": content}

    rendered = render([user("q"), assistant("a"), tool("1"), tool("2"), assistant("b"), tool("3")])
    assert (
        turn("tool_response", "<tool_response>1</tool_response><tool_response>2</tool_response>") in rendered
    )
    assert rendered.endswith(turn("tool_response", "<tool_response>3</tool_response>"))


def test_an_answer_survives_the_way_back() -> None:
    from step35_trt.runtime.dialogue.tool_calls import AnswerParser, ContentDelta, ReasoningDelta, ToolCall

    messages = [
        user("q"),
        assistant("Let me see.", reasoning_content="hm", tool_calls=[call("wetter", {"city": "Köln\n"})]),
    ]
    answer = render(messages).removeprefix(render(messages[:1], prompt=True)).removesuffix("<|im_end|>\n")
    parser = AnswerParser([WEATHER], in_reasoning=True)
    assert [*parser.push(answer), *parser.finish()] == [
        ReasoningDelta("hm"),
        ContentDelta("Let me see."),
        ToolCall("wetter", {"city": "Köln\n"}),
    ]


# Messages as clients send them.


def test_what_clients_send_back_is_accepted() -> None:
    sent = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "tool_calls": [call("clock", "")],
        "reasoning": "hm",
    }
    (message,) = parse_messages([sent])
    assert message.content == ""
    assert message.reasoning_content == "hm"
    assert message.tool_calls[0].function.arguments == {}
    assert parse_messages([{"role": "developer", "content": "x"}])[0].role == "system"


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "there is none"),
        ("hello", "messages: .*list"),
        ([3], r"messages\.0: "),
        ([{"content": "x"}], r"messages\.0\.role"),
        ([user("a"), {"role": "robot", "content": "x"}], r"messages\.1\.role"),
        ([user(7)], r"messages\.0\.content"),
        ([user([{"type": "image_url", "image_url": {"url": "x"}}])], "image_url is not supported"),
        ([user(["a"])], "part"),
        ([user([{"type": "text", "text": 5}])], "text part"),
        ([user("x") | {"audio": {"id": 1}}], "audio: this field is not supported"),
        ([user("x") | {"tool_calls": [call("f", {})]}], "only an assistant"),
        ([assistant(tool_calls=[call("f", "{")])], "not valid JSON"),
        ([assistant(tool_calls=[call("f", "[]")])], "not a JSON object"),
        ([assistant(tool_calls=[call("f", '{"a": NaN}')])], "not valid JSON"),
        ([assistant(tool_calls=[call("", {})])], "name"),
        ([assistant(tool_calls=[{"type": "custom"}])], "tool_calls"),
    ],
)
def test_wrong_messages_are_refused_in_one_sentence(messages: Any, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint) as caught:
        parse_messages(messages)
    assert "\n" not in caught.value.message


def test_tools_are_checked_and_passed_on_as_sent() -> None:
    tool = {"function": {"parameters": {"b": 1, "a": 2}, "name": "f", "strict": True}, "type": "function"}
    assert json.dumps(parse_tools([tool])) == json.dumps([tool])
    wrongs: list[Any] = [
        {},
        [{}],
        [{"type": "web_search"}],
        [{"type": "function", "function": {"name": "a>b"}}],
    ]
    for wrong in wrongs:
        with pytest.raises(UsageError, match="tools"):
            parse_tools(wrong)


# Templates as checkpoints bring them.


def test_helpers_that_templates_expect() -> None:
    template = ChatTemplate.compile(
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content | tojson }}"
        "{% endfor %}{{ {'a': 'ü<'} | tojson(indent=1) }}{{ strftime_now('%Y') | length }}"
        "{{ eos_token }}{{ tools is none }}",
        {"eos_token": "<EOS>"},
    )
    assert template.render(parse_messages([user("é<"), user("b")])) == '"é<"{\n "a": "ü<"\n}4<EOS>True'


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[0].content + 1 }}",
        "{{ nothing.at.all }}",
        "{{ ''.__class__.__mro__ }}{{ ().__class__.__bases__[0].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ 1 // 0 }}",
        "{% for a in range(10**9) %}{% endfor %}",
    ],
)
def test_a_template_that_fails_is_an_error_of_one_sentence(source: str) -> None:
    with pytest.raises(UsageError, match="chat template"):
        ChatTemplate.compile(source, {}).render(parse_messages([user("x")]))


def test_a_template_that_is_no_jinja_is_corrupt() -> None:
    with pytest.raises(CorruptInputError, match="not valid Jinja"):
        ChatTemplate.compile("{% if %}", {})


def test_the_template_of_a_tokenizer(tmp_path: Path) -> None:
    text = Text.load(write_tokenizer(tmp_path / "a", SOURCE))
    prompt = ChatTemplate.of(text).render(parse_messages([user("Hi")]))
    ids = text.encode(prompt)
    assert text.bos_id is not None
    assert ids.count(text.bos_id) == 1
    with pytest.raises(UsageError, match="no chat template"):
        ChatTemplate.of(Text.load(write_tokenizer(tmp_path / "b")))
