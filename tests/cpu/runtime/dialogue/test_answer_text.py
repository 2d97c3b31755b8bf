from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step35_trt.errors import UsageError
from step35_trt.runtime.decoding.generation_stats import GenerationStats
from step35_trt.runtime.decoding.sampling import SamplingParams
from step35_trt.runtime.dialogue.answer_text import StopStrings, complete, undecided
from step35_trt.runtime.dialogue.text import Text
from tests.texts import ScriptedSession, write_tokenizer

GREEDY = SamplingParams()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return Text.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def in_pieces(source: str, cuts: list[int]) -> list[str]:
    edges = sorted({0, len(source), *(cut % (len(source) + 1) for cut in cuts)})
    return [source[a:b] for a, b in pairwise(edges)]


@given(
    st.text("abc", max_size=20),
    st.lists(st.text("abc", min_size=1, max_size=5), max_size=3),
    st.lists(st.integers(0, 100)),
)
def test_stop_strings_cut_at_the_earliest_match(source: str, stops: list[str], cuts: list[int]) -> None:
    places = [at for stop in stops if (at := source.find(stop)) >= 0]
    expected = source[: min(places)] if places else source
    filter_ = StopStrings(stops)
    shown = ""
    for piece in in_pieces(source, cuts):
        shown += filter_.push(piece)
        assert expected.startswith(shown)
    shown += filter_.finish()
    assert shown == expected
    assert filter_.hit == bool(places)


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_undecided_is_the_longest_end_that_may_grow(source: str, marks: list[str]) -> None:
    growing = [
        at for at in range(len(source)) if any(m.startswith(source[at:]) and m != source[at:] for m in marks)
    ]
    assert undecided(source, marks) == min(growing, default=len(source))


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        StopStrings(["a", ""])


@pytest.mark.parametrize("drafts", [0, 1, 3, "auto"])
def test_complete_streams_what_the_model_says(text: Text, drafts: int) -> None:
    session = ScriptedSession(text, lambda prompt: "Ein Übersetzer 🙂 生成")
    stats = GenerationStats()
    pieces = complete(
        session,
        text,
        text.encode("The parser"),
        GREEDY,
        max_tokens=100,
        stop_ids=session.config.eos_token_id,
        draft_tokens=drafts,
        stats=stats,
    )
    listed = list(pieces)
    assert "".join(listed) == "Ein Übersetzer 🙂 生成"
    assert len(listed) > 1
    assert all(listed)
    assert stats.finish_reason == "stop"


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_stop_string_ends_the_answer_and_the_count(text: Text, drafts: int) -> None:
    session = ScriptedSession(text, lambda prompt: "hello there END and more")
    stats = GenerationStats()
    pieces = complete(
        session,
        text,
        text.encode("x"),
        GREEDY,
        max_tokens=100,
        stop_strings=["END", "never"],
        draft_tokens=drafts,
        stats=stats,
    )
    assert "".join(pieces) == "hello there "
    assert stats.finish_reason == "stop"
    needed = text.tokenizer.encode("hello there END", add_special_tokens=False).ids
    assert stats.generated_tokens == len(needed)


def test_the_limit_may_cut_a_character(text: Text) -> None:
    session = ScriptedSession(text, lambda prompt: "🙈")
    assert len(text.encode("🙈")) > 2
    stats = GenerationStats()
    pieces = complete(session, text, text.encode("x"), GREEDY, max_tokens=1, stats=stats)
    assert list(pieces) == ["\ufffd"]
    assert stats.finish_reason == "length"


def test_a_half_grown_stop_string_is_shown_at_the_end(text: Text) -> None:
    session = ScriptedSession(text, lambda prompt: "hello EN")
    pieces = complete(
        session,
        text,
        text.encode("x"),
        GREEDY,
        max_tokens=50,
        stop_ids=session.config.eos_token_id,
        stop_strings=["END"],
    )
    assert "".join(pieces) == "hello EN"


def test_arguments_are_checked_by_the_call_itself(text: Text) -> None:
    session = ScriptedSession(text, lambda prompt: "x")
    with pytest.raises(UsageError):
        complete(session, text, [], GREEDY, max_tokens=5)
    with pytest.raises(UsageError):
        complete(session, text, [1], GREEDY, max_tokens=5, stop_strings=[""])
