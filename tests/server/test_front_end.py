"""Requests as Triton's OpenAI front end makes them for models that are not vLLM's.

The front end itself needs a package that only comes inside the server's container, so what is here is its
mapping: which tensors it sends, in which shapes, and which it reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.server.served import Stream

if TYPE_CHECKING:
    from tests.server.conftest import Offline
    from tests.server.served import Served

PROMPT = "def read(self, size=-1):"
ALWAYS = {"return_num_input_tokens": True, "return_num_output_tokens": True}


def test_a_completion(served: Served, offline: Offline) -> None:
    expected = offline.answer(PROMPT, 24, stops=("the",))
    (response,) = Stream(
        served.grpc,
        text_input=PROMPT,
        stream=False,
        max_tokens=24,
        stop_words=["the"],
        top_p=1.0,
        frequency_penalty=0.0,
        presence_penalty=0.0,
        seed=3,
        temperature=0.0,
        exclude_input_in_output=True,
        **ALWAYS,
    )
    assert response.as_numpy("text_output").size == 1
    assert response.as_numpy("text_output").item().decode() == expected.text
    assert response.as_numpy("num_input_tokens").item() == len(offline.text.encode(PROMPT))
    assert response.as_numpy("num_output_tokens").item() == len(expected.token_ids)


def test_a_stream_counts_its_tokens(served: Served, offline: Offline) -> None:
    expected = offline.answer(PROMPT, 24)
    responses = list(Stream(served.grpc, text_input=PROMPT, stream=True, max_tokens=24, **ALWAYS))
    counted = sum(response.as_numpy("num_output_tokens").item() for response in responses)
    assert counted == len(expected.token_ids)


def test_echo_puts_the_prompt_first(served: Served, offline: Offline) -> None:
    fields = {"text_input": PROMPT, "max_tokens": 5, "exclude_input_in_output": False}
    whole = PROMPT + offline.answer(PROMPT, 5).text
    assert served.generate(**fields)["text_output"] == whole
    assert "".join(event["text_output"] for event in served.events(**fields)) == whole


def test_penalties_are_refused(served: Served) -> None:
    from tritonclient.utils import InferenceServerException

    with pytest.raises(InferenceServerException, match="frequency_penalty"):
        list(Stream(served.grpc, text_input=PROMPT, max_tokens=5, frequency_penalty=0.3))
