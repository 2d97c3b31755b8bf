from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from step35_trt.errors import Step35Error, UsageError
from step35_trt.resources import NANO
from step35_trt.runtime.dialogue.text import Text
from step35_trt.triton_repo.limits import ServingLimits
from step35_trt.triton_repo.requests import DEFAULT_OUTPUT_TOKENS, parse, timeout_of
from step35_trt.triton_repo.tensors import INPUTS

if TYPE_CHECKING:
    from step35_trt.triton_repo.requests import Wanted

LIMITS = ServingLimits.of(64, 4)
TEXT = Text.load(NANO)
STOP_IDS = (1, 2)


def strings(*values: bytes | str) -> Any:
    return np.array([[v if isinstance(v, bytes) else v.encode() for v in values]], dtype=object)


def read(parameters: dict[str, object] | None = None, text: Text | None = TEXT, **inputs: Any) -> Wanted:
    arrays = {
        name: value if isinstance(value, np.ndarray) else np.array([[value]])
        for name, value in inputs.items()
    }
    return parse(arrays, parameters or {}, text, STOP_IDS, LIMITS)


def test_what_is_not_said_takes_a_default() -> None:
    wanted = read(text_input=strings("def f"))
    assert wanted.tokens.prompt_ids == TEXT.encode("def f")
    assert wanted.tokens.max_tokens == DEFAULT_OUTPUT_TOKENS
    assert wanted.tokens.stop_ids == STOP_IDS
    assert wanted.tokens.sampling.greedy
    assert (wanted.stream, wanted.stop_strings, wanted.prefix) == (False, (), "")


def test_everything_that_is_said_arrives() -> None:
    wanted = read(
        text_input=strings("def f"),
        max_tokens=np.int32(7),
        temperature=np.float32(0.5),
        top_p=np.float32(0.75),
        top_k=np.int32(9),
        min_p=np.float32(0.25),
        random_seed=np.uint64(2**64 - 1),
        stop_words=strings("a", "", "b"),
        bad_words=strings("class"),
        end_id=np.int32(5),
        stream=np.True_,
        return_log_probs=np.False_,
        exclude_input_in_output=np.False_,
        parameters={"id": "x", "timeout": 5},
    )
    tokens, sampling = wanted.tokens, wanted.tokens.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.75, 9, 0.25)
    assert sampling.seed == 2**64 - 1
    assert (tokens.max_tokens, tokens.stop_ids) == (7, (5,))
    assert (wanted.stop_strings, wanted.stream, wanted.prefix) == (("a", "b"), True, "def f")
    assert set(sampling.bad_words) == {tuple(TEXT.ids("class")), tuple(TEXT.ids(" class"))}
    assert read(input_ids=np.array([[3, 4]]), end_id=np.int32(-1)).tokens.stop_ids == ()
    assert read(input_ids=np.array([[3, 4, 0]]), input_lengths=2).tokens.prompt_ids == [3, 4]


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ({}, "text_input or input_ids"),
        ({"text_input": strings("a"), "input_ids": np.array([[1]])}, "text_input or input_ids"),
        ({"text_input": strings("a", "b")}, "text_input has 2"),
        ({"text_input": strings(b"\xff")}, "UTF-8"),
        ({"text_input": strings("a" * (16 * 64 + 1))}, "bytes"),
        ({"text_input": strings("a b " * 60)}, "tokens"),
        ({"input_ids": np.array([[]], dtype=np.int32)}, "empty"),
        ({"input_ids": np.array([[1, 2], [3, 4]])}, "batch of 2"),
        ({"text_input": np.array([[b"a"], [b"b"]], dtype=object)}, "batch of 2"),
        ({"input_ids": np.array([[1, 2]]), "input_lengths": 3}, "input_lengths"),
        ({"input_ids": np.array([[1, 2]]), "input_lengths": 0}, "input_lengths"),
        ({"text_input": strings("a"), "max_tokens": 65}, "max_tokens"),
        ({"text_input": strings("a"), "max_tokens": 1, "request_output_len": 1}, "request_output_len"),
        ({"text_input": strings("a"), "stop_words": strings(*"abcdefghijklmnopq")}, "stop_words"),
        ({"text_input": strings("a"), "stop_words": strings("x" * 257)}, "stop_words"),
        ({"text_input": strings("a"), "temperature": np.float32("nan")}, "temperature"),
        ({"text_input": strings("a"), "beam_width": 2}, "beam_width"),
        ({"text_input": strings("a"), "repetition_penalty": np.float32(1.1)}, "repetition_penalty"),
    ],
)
def test_what_is_off_is_named(inputs: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        read(**inputs)


@pytest.mark.parametrize("name", ["temprature", "priority", "sequence_id"])
def test_an_unknown_parameter_is_no_silence(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        read(text_input=strings("a"), parameters={name: 1})


def test_a_timeout_comes_with_the_protocol_or_as_a_field() -> None:
    assert timeout_of(0, {}) is None
    assert timeout_of(500_000, {}) == 0.5
    assert timeout_of(0, {"timeout": 250_000}) == 0.25
    for bad in (-1, 0, 0.5, "1", True):
        with pytest.raises(UsageError, match="timeout"):
            timeout_of(0, {"timeout": bad})


def test_without_a_tokenizer_ids_are_answered() -> None:
    assert read(text=None, input_ids=np.array([[3, 4]])).tokens.prompt_ids == [3, 4]
    for inputs in ({"text_input": strings("a")}, {"input_ids": np.array([[3]]), "stop_words": strings("a")}):
        with pytest.raises(UsageError, match="tokenizer"):
            read(text=None, **inputs)


ARRAYS = {
    "STRING": st.lists(st.binary(max_size=20), max_size=20),
    "BOOL": st.lists(st.booleans(), max_size=3),
    "INT32": st.lists(st.integers(-(2**31), 2**31 - 1), max_size=80),
    "UINT64": st.lists(st.integers(0, 2**64 - 1), max_size=2),
    "FP32": st.lists(st.floats(width=32), max_size=2),
}
DTYPES = {"STRING": object, "BOOL": np.bool_, "INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32}


@given(
    st.fixed_dictionaries(
        {},
        optional={t.name: ARRAYS[t.kind].map(lambda v, t=t: np.array([v], DTYPES[t.kind])) for t in INPUTS},
    )
)
def test_whatever_comes_is_a_request_or_its_own_error(inputs: dict[str, Any]) -> None:
    try:
        wanted = parse(inputs, {}, TEXT, STOP_IDS, LIMITS)
    except Step35Error:
        return
    assert 0 < wanted.tokens.max_tokens <= LIMITS.output_tokens
    assert 0 < len(wanted.tokens.prompt_ids) <= LIMITS.prompt_tokens


def test_limits_are_numbers() -> None:
    texts = {name: str(value) for name, value in LIMITS.model_dump().items()}
    assert ServingLimits.read({**texts, "bundle": "/x"}) == LIMITS
    for bad in ({**texts, "words": "many"}, {**texts, "sequences": "0"}, {}):
        with pytest.raises(UsageError, match=r"config\.pbtxt"):
            ServingLimits.read(bad)
