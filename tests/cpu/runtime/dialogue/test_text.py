from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step35_trt.errors import CorruptInputError, UnsupportedError, UsageError
from step35_trt.runtime.dialogue.text import Text
from tests.texts import BOS, LINES, tokenizer_source, write_tokenizer

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return Text.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_the_prompt_begins_with_bos_exactly_once(text: Text) -> None:
    bos = text.tokenizer.token_to_id(BOS)
    ids = text.encode("The parser")
    assert ids[0] == bos
    assert ids.count(bos) == 1
    assert text.encode(BOS + "The parser") == ids
    assert text.encode("") == [bos]


def test_bos_is_left_out_where_the_files_say_so(tmp_path: Path) -> None:
    assert Text.load(write_tokenizer(tmp_path / "a", add_bos_token=False)).bos_id is None
    assert Text.load(write_tokenizer(tmp_path / "b", bos_token=None)).encode("a") == [
        *Text.load(write_tokenizer(tmp_path / "c")).encode("a")[1:]
    ]


def test_works_without_a_tokenizer_config(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer_source(), encoding="utf-8")
    text = Text.load(tmp_path)
    assert text.decode(text.encode(LINES[3])) == LINES[3]
    assert text.chat_template is None


def test_saved_truncation_does_not_shorten_prompts(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    source = json.loads(tokenizer_source())
    source["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(source))
    assert len(Text.load(tmp_path).encode(LINES[0])) > 4


def test_special_tokens_are_hidden_but_markers_are_not(text: Text) -> None:
    shown = f"a{BOS}<think>b</think><tool_call>naïve plain</tool_call><|im_end|>"
    ids = text.tokenizer.encode(shown, add_special_tokens=False).ids
    assert text.decode(ids) == "a<think>b</think><tool_call>naïve plain</tool_call>"
    assert text.decode([10**6, text.tokenizer.get_vocab_size()]) == ""


def test_a_lone_surrogate_is_an_error(text: Text) -> None:
    with pytest.raises(UsageError, match="surrogate"):
        text.encode("a\ud800")


@given(st.lists(st.integers(0, 520), max_size=40))
def test_pieces_join_to_the_whole_and_to_the_library(text: Text, ids: list[int]) -> None:
    detokenizer = text.detokenizer()
    pieces = [detokenizer.push(i) for i in ids]
    pieces.append(detokenizer.finish())
    assert "".join(pieces) == text.decode(ids)
    visible = [i for i in ids if i not in text.hidden]
    assert "".join(pieces) == text.tokenizer.decode(visible, skip_special_tokens=False)


@given(st.text(max_size=60).filter(lambda prompt: "<" not in prompt))
def test_no_half_character_is_ever_shown(text: Text, prompt: str) -> None:
    detokenizer = text.detokenizer()
    shown = ""
    for token_id in text.tokenizer.encode(prompt, add_special_tokens=False).ids:
        shown += detokenizer.push(token_id)
        assert prompt.startswith(shown)
    assert detokenizer.finish() == ""
    assert shown == prompt


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("tokenizer.json", "not json", "not a tokenizer"),
        ("tokenizer.json", "\x00" * 20, "not a tokenizer"),
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", "[]", "does not hold an object"),
        ("tokenizer_config.json", '{"bos_token": "<nowhere>"}', "<nowhere>"),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat_template"),
    ],
)
def test_damaged_files_are_named_in_one_sentence(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    path = write_tokenizer(tmp_path) / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(CorruptInputError, match=message) as caught:
        Text.load(tmp_path)
    assert "\n" not in caught.value.message


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (write_tokenizer(tmp_path) / "tokenizer.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(CorruptInputError, match="cannot be read"):
        Text.load(tmp_path)


@given(st.data())
def test_a_cut_tokenizer_is_corrupt(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    source = tokenizer_source()
    directory = tmp_path_factory.mktemp("cut")
    cut = data.draw(st.integers(0, len(source) - 2))
    (directory / "tokenizer.json").write_text(source[:cut], encoding="utf-8")
    with pytest.raises(CorruptInputError):
        Text.load(directory)


def test_another_kind_of_tokenizer_is_unsupported(tmp_path: Path) -> None:
    source = json.loads(tokenizer_source())
    source["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (write_tokenizer(tmp_path) / "tokenizer.json").write_text(json.dumps(source))
    with pytest.raises(UnsupportedError, match="byte-level"):
        Text.load(tmp_path)


def test_the_template_file_comes_before_the_config(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "listed"}]
    assert Text.load(write_tokenizer(tmp_path / "a", chat_template="inline")).chat_template == "inline"
    assert Text.load(write_tokenizer(tmp_path / "b", chat_template=named)).chat_template == "listed"
    assert Text.load(write_tokenizer(tmp_path / "c", "file", chat_template="inline")).chat_template == "file"
