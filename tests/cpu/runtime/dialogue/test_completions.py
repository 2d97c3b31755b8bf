from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import step35_trt.nano
from step35_trt.errors import DoesNotFitError, UsageError
from step35_trt.runtime.decoding.sampling import SamplingParams
from step35_trt.runtime.dialogue.chat import ChatTemplate
from step35_trt.runtime.dialogue.completions import COMPLETION_TOKENS, answer, parse_body
from step35_trt.runtime.dialogue.text import Text
from tests.texts import ScriptedSession, write_tokenizer

SOURCE = (Path(step35_trt.nano.__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")
HELLO = [{"role": "user", "content": "hello"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"properties": {"a": {"type": "integer"}, "b": {"type": "string"}}},
    },
}
CALLS = (
    "thinking\n</think>\n\nAdding.\n"
    "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\nü\n</parameter>\n"
    "</function>\n</tool_call>\n<tool_call>\n<function=add>\n</function>\n</tool_call>"
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return Text.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), SOURCE))


def ask(text: Text, reply: str, max_context: int = 4096, **body: Any) -> dict[str, Any]:
    session = ScriptedSession(text, lambda prompt: reply, max_context)
    return answer(session, text, ChatTemplate.of(text), parse_body(body), "tag")


def test_a_chat_completion(text: Text) -> None:
    result = ask(text, "why\n</think>\nHi there.", messages=HELLO)
    usage = result.pop("usage")
    assert result == {
        "id": "chatcmpl-tag",
        "object": "chat.completion",
        "created": 0,
        "model": "step-3.5-flash",
        "choices": [
            {
                "index": 0,
                "logprobs": None,
                "message": {"role": "assistant", "content": "Hi there.", "reasoning_content": "why"},
                "finish_reason": "stop",
            }
        ],
    }
    assert usage["completion_tokens"] == len(text.tokenizer.encode("why\n</think>\nHi there.").ids)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_the_model_sees_the_rendered_chat(text: Text) -> None:
    session = ScriptedSession(text, lambda prompt: "</think>x")
    answer(session, text, ChatTemplate.of(text), parse_body({"messages": HELLO, "tools": [TOOL]}), "tag")
    (prompt,) = session.prompts
    assert prompt.startswith(text.special_tokens["bos_token"] + "<|im_start|>system\n# Tools")
    assert prompt.endswith("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n<think>\n")


def test_tool_calls(text: Text) -> None:
    choice = ask(text, CALLS, messages=HELLO, tools=[TOOL])["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Adding."
    first, second = choice["message"]["tool_calls"]
    assert (first["id"], second["id"]) == ("call_tag_0", "call_tag_1")
    assert first["function"]["name"] == "add"
    assert json.loads(first["function"]["arguments"]) == {"a": 1, "b": "ü"}
    assert second["function"]["arguments"] == "{}"


def test_calls_without_content_and_calls_nobody_wants(text: Text) -> None:
    only = ask(text, CALLS.replace("Adding.", ""), messages=HELLO, tools=[TOOL])
    assert only["choices"][0]["message"]["content"] is None
    unwanted = ask(text, CALLS, messages=HELLO, tools=[TOOL], tool_choice="none")["choices"][0]
    assert "tool_calls" not in unwanted["message"]
    assert "<function=add>" in unwanted["message"]["content"]
    assert unwanted["finish_reason"] == "stop"


def test_a_text_completion(text: Text) -> None:
    result = ask(text, "one two END three", prompt="count", max_tokens=50, stop="END")
    assert result["id"] == "cmpl-tag"
    assert result["object"] == "text_completion"
    assert result["choices"][0]["text"] == "one two "
    assert result["choices"][0]["finish_reason"] == "stop"
    ids = ask(text, "one two", prompt=text.encode("count"), max_completion_tokens=50)
    assert ids["choices"][0]["text"] == "one two"
    assert ids["usage"]["prompt_tokens"] == result["usage"]["prompt_tokens"]


def test_limits(text: Text) -> None:
    long = "word " * 200
    assert ask(text, long, prompt="x")["usage"]["completion_tokens"] == COMPLETION_TOKENS
    cut = ask(text, long, max_context=100, messages=HELLO)
    assert cut["choices"][0]["finish_reason"] == "length"
    assert cut["usage"]["total_tokens"] == 100
    with pytest.raises(DoesNotFitError):
        ask(text, "x", max_context=100, prompt=long)


def test_sampling_fields_reach_the_sampler() -> None:
    body = parse_body({"prompt": "x", "temperature": 1, "top_p": 0.9, "top_k": -1, "min_p": 0.1, "seed": 7})
    assert body.sampling == SamplingParams(temperature=1, top_p=0.9, top_k=0, min_p=0.1, seed=7)
    assert parse_body({"prompt": "x", "temperature": None}).sampling == SamplingParams()


def test_fields_that_change_nothing_are_accepted() -> None:
    neutral = {
        "n": 1,
        "stream": False,
        "logprobs": None,
        "presence_penalty": 0.0,
        "response_format": {"type": "text"},
    }
    assert (
        parse_body({"prompt": "x", "user": "me", "metadata": {}, "guided_json": None} | neutral).prompt == "x"
    )


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({}, "either messages or a prompt"),
        ({"prompt": "x", "messages": HELLO}, "either messages or a prompt"),
        ({"prompt": ["a", "b"]}, "prompt: a prompt is one text"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [1, 10**6]}, "vocabulary"),
        ({"prompt": [1, 10**30]}, "token ids"),
        ({"prompt": [-1]}, "vocabulary"),
        ({"prompt": "x", "n": 2}, "n 2 is not supported, only 1"),
        ({"prompt": "x", "logprobs": 0}, "logprobs 0 is not supported"),
        ({"prompt": "x", "stream": True}, "stream true"),
        ({"prompt": "x", "logit_bias": {"5": 1}}, "logit_bias"),
        ({"prompt": "x", "response_format": {"type": "json_object"}}, "response_format"),
        ({"prompt": "x", "guided_json": {}}, "guided_json: this field is not supported"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 1.5}, "max_tokens"),
        ({"prompt": "x", "max_tokens": "9"}, "max_tokens"),
        ({"prompt": "x", "max_tokens": True}, "max_tokens"),
        ({"prompt": "x", "temperature": "hot"}, "temperature"),
        ({"prompt": "x", "temperature": -1}, "temperature"),
        ({"prompt": "x", "temperature": float("inf")}, "temperature"),
        ({"prompt": "x", "top_p": 0}, "top_p"),
        ({"prompt": "x", "top_k": -2}, "top_k"),
        ({"prompt": "x", "seed": -1}, "seed"),
        ({"prompt": "x", "stop": 5}, "stop"),
        ({"prompt": "x", "stop": [5]}, "stop"),
        ({"prompt": "x", "stop": ""}, "stop string is empty"),
        ({"prompt": "x", "tools": [TOOL]}, "tools need messages"),
        ({"messages": HELLO, "tools": [{}]}, "tools"),
        ({"messages": HELLO, "tool_choice": "required"}, "required"),
        ({"messages": HELLO, "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
    ],
)
def test_wrong_fields_are_named_in_one_sentence(text: Text, body: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint) as caught:
        ask(text, "x", **body)
    assert "\n" not in caught.value.message


def test_a_chat_needs_a_template(text: Text) -> None:
    session = ScriptedSession(text, lambda prompt: "x")
    with pytest.raises(UsageError, match="no chat template"):
        answer(session, text, None, parse_body({"messages": HELLO}), "tag")
