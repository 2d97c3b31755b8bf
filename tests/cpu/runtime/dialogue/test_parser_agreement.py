"""Our cases, and what an independent implementation of the same format made of them (see the JSON file)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from step35_trt.runtime.dialogue.tool_calls import AnswerParser, ContentDelta, ReasoningDelta, ToolCall

RECORDED = json.loads((Path(__file__).parent / "parser_cases.json").read_text(encoding="utf-8"))
# Where we mean to differ: `observed` loses or changes what the model wrote.
OURS: dict[str, dict[str, Any]] = {
    "null for a number": {"calls": [["add", {"a": "null", "b": 2}]]},
    "a broken call: cut off": {
        "content": "Look: <tool_call>\n<function=weather>\n<parameter=city>\nPar",
        "calls": [],
    },
    "a broken call: no function": {"content": "<tool_call>\nhello\n</tool_call>"},
    "words after a call": {"content": "Done."},
}


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: case["name"])
def test_the_same_is_read_as_elsewhere(case: dict[str, Any]) -> None:
    for size in (len(case["stream"]), 1, 3):
        parser = AnswerParser(RECORDED["tools"], in_reasoning=case["reasoning"])
        pieces = [case["stream"][at : at + size] for at in range(0, len(case["stream"]), size)]
        events = [event for piece in pieces for event in parser.push(piece)] + parser.finish()
        read = {
            "reasoning": "".join(e.text for e in events if isinstance(e, ReasoningDelta)).strip(),
            "content": "".join(e.text for e in events if isinstance(e, ContentDelta)).strip(),
            "calls": [[e.name, e.arguments] for e in events if isinstance(e, ToolCall)],
        }
        assert read == case["observed"] | OURS.get(case["name"], {})


def test_every_difference_has_a_reason() -> None:
    differing = {case["name"] for case in RECORDED["cases"] if "differs" in case}
    assert differing == set(OURS)
    assert len(RECORDED["cases"]) - len(OURS) >= 20
