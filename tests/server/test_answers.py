"""What a real server answers is what the bundle answers without one."""

from __future__ import annotations

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from step35_trt.runtime.decoding.sampling import SamplingParams
from step35_trt.triton_repo.host import REPORT_SECONDS
from tests.server.served import Served, Stream, joined

if TYPE_CHECKING:
    from tests.server.conftest import Offline

PROMPT = "def read(self, size=-1):"
PROMPTS = [
    PROMPT,
    "The import statement",
    "class Meta:\n    ",
    "Returns the",
    "for i in range(",
    "é ü 漢字 🙂",
]


def test_http_gives_text_ids_and_counts(served: Served, offline: Offline) -> None:
    answer = served.generate(text_input=PROMPT, max_tokens=24)
    expected = offline.answer(PROMPT, 24)
    assert answer["text_output"] == expected.text
    assert answer["output_ids"] == expected.token_ids
    assert answer["sequence_length"] == answer["num_output_tokens"] == len(expected.token_ids)
    assert answer["num_input_tokens"] == len(offline.text.encode(PROMPT))
    assert answer["finish_reason"] == expected.finish_reason


@pytest.mark.parametrize("prompt", PROMPTS)
def test_pieces_of_a_stream_make_the_answer(served: Served, offline: Offline, prompt: str) -> None:
    expected = offline.answer(prompt, 40)
    over_http = served.events(text_input=prompt, max_tokens=40)
    assert "".join(event["text_output"] for event in over_http) == expected.text
    over_grpc = list(Stream(served.grpc, text_input=prompt, max_tokens=40, stream=True))
    assert joined(over_grpc) == (expected.text, expected.token_ids)
    assert [r.as_numpy("finish_reason") is not None for r in over_grpc] == [False] * (len(over_grpc) - 1) + [
        True
    ]
    assert over_grpc[-1].as_numpy("finish_reason").item().decode() == expected.finish_reason


def test_a_stream_has_pieces(served: Served, offline: Offline) -> None:
    """Of a long answer: nano makes a short one while the thread that sends waits for a core."""
    assert len(served.events(text_input=PROMPT, max_tokens=600)) > 1
    ids = offline.text.encode(PROMPT)
    fields = {"input_ids": ids, "input_lengths": len(ids), "request_output_len": 600}
    for model in ("step35_tokens", "step35"):
        pieces = list(Stream(served.grpc, model, **fields, stream=True))
        assert len(pieces) > 1
        assert sum(piece.as_numpy("output_ids").size for piece in pieces) > 200


def test_the_token_model_has_tensorrt_llms_names_and_shapes(served: Served, offline: Offline) -> None:
    ids = offline.text.encode(PROMPT)
    expected = offline.answer(ids, 20).token_ids
    fields = {"input_ids": ids, "input_lengths": len(ids), "request_output_len": 20}
    for model in ("step35_tokens", "step35"):
        (result,) = Stream(served.grpc, model, **fields)
        assert result.as_numpy("output_ids").shape == (1, 1, len(expected))
        assert result.as_numpy("output_ids").ravel().tolist() == expected
        assert result.as_numpy("sequence_length").tolist() == [[len(expected)]]
        pieces = list(Stream(served.grpc, model, **fields, stream=True))
        assert [int(i) for piece in pieces for i in piece.as_numpy("output_ids").ravel()] == expected
    # Ids beyond input_lengths are padding; end_id ends an answer and is no part of it.
    padded = {**fields, "input_ids": [*ids, 7, 7, 7], "end_id": expected[9]}
    (result,) = Stream(served.grpc, "step35_tokens", **padded)
    assert result.as_numpy("output_ids").ravel().tolist() == expected[: expected.index(expected[9])]


def test_answers_of_many_streams_at_once_are_those_of_each_alone(served: Served, offline: Offline) -> None:
    wanted = [(prompt, 20 + 7 * turn) for turn in range(4) for prompt in PROMPTS]
    expected = [offline.answer(prompt, tokens) for prompt, tokens in wanted]

    def ask(job: tuple[str, int]) -> tuple[str, list[int]]:
        return joined(list(Stream(served.grpc, text_input=job[0], max_tokens=job[1], stream=True)))

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, wanted))
    assert answers == [(e.text, e.token_ids) for e in expected]


def test_requests_that_come_at_once_are_handed_over_together(served: Served, offline: Offline) -> None:
    """Of different lengths and with different inputs, among them one that is refused."""
    before = executions(served)
    wanted: list[dict[str, object]] = [
        {"text_input": prompt, "max_tokens": 6 + turn} for turn in range(3) for prompt in PROMPTS
    ]
    wanted[4] = {**wanted[4], "max_tokens": -1}
    wanted[7] = {"input_ids": offline.text.encode(PROMPT), "max_tokens": 9}

    def ask(fields: dict[str, object]) -> list[int]:
        try:
            return joined(list(Stream(served.grpc, **fields)))[1]
        except Exception:
            return []

    with ThreadPoolExecutor(len(wanted)) as pool:
        answers = list(pool.map(ask, wanted))
    wanted[7] = {"text_input": PROMPT, "max_tokens": 9}
    for place, (fields, ids) in enumerate(zip(wanted, answers, strict=True)):
        prompt, tokens = str(fields["text_input"]), int(str(fields["max_tokens"]))
        assert ids == ([] if place == 4 else offline.answer(prompt, tokens).token_ids)
    assert executions(served) - before < len(wanted)


def executions(served: Served) -> int:
    """How often the server has handed something over."""
    body = json.loads(served.get("/v2/models/step35/stats")[1])
    return int(body["model_stats"][0]["execution_count"])


def test_a_seed_repeats_an_answer(served: Served) -> None:
    fields = {"text_input": PROMPT, "max_tokens": 30, "temperature": 1.0, "top_p": 0.9, "top_k": 50}
    first, again = (served.generate(**fields, random_seed=2**63 + 5)["output_ids"] for _ in range(2))
    assert first == again
    assert served.generate(**fields, seed=2**63 + 5)["output_ids"] == first
    assert served.generate(**fields, random_seed=6)["output_ids"] != first


def test_stop_words_end_the_text(served: Served, offline: Offline) -> None:
    expected = offline.answer(PROMPT, 60, stops=("the", "zzz"))
    assert expected.finish_reason == "stop"
    fields = {"text_input": PROMPT, "max_tokens": 60, "stop_words": ["the", "zzz", ""]}
    answer = served.generate(**fields)
    assert (answer["text_output"], answer["finish_reason"]) == (expected.text, "stop")
    assert answer["output_ids"] == expected.token_ids
    assert "".join(event["text_output"] for event in served.events(**fields)) == expected.text


def test_bad_words_do_not_come(served: Served, offline: Offline) -> None:
    free = served.generate(text_input=PROMPT, max_tokens=24)["text_output"]
    assert "Return" in free
    answer = served.generate(text_input=PROMPT, max_tokens=24, bad_words=["Return", "Returns"])
    forms = ("Return", " Return", "Returns", " Returns")
    bad = tuple(tuple(offline.text.ids(form)) for form in forms)
    assert answer["output_ids"] == offline.answer(PROMPT, 24, SamplingParams(bad_words=bad)).token_ids
    assert answer["text_output"] != free


def test_log_probabilities_add_up(served: Served, offline: Offline) -> None:
    expected = offline.answer(PROMPT, 24, SamplingParams(log_probabilities=True))
    whole = served.generate(text_input=PROMPT, max_tokens=24, return_log_probs=True)
    streamed = served.events(text_input=PROMPT, max_tokens=24, return_log_probs=True)
    assert math.isclose(whole["cum_log_probs"], expected.log_probability, rel_tol=1e-4)
    assert expected.log_probability < -1
    assert math.isclose(streamed[-1]["cum_log_probs"], expected.log_probability, rel_tol=1e-4)
    assert "cum_log_probs" not in served.generate(text_input=PROMPT, max_tokens=2)


def test_the_figures_are_on_the_metrics_page(served: Served) -> None:
    for _ in range(5):  # another test's last figures may still have been on their way
        time.sleep(REPORT_SECONDS)
        prompt, generated = (served.metric("step35_tokens", kind) for kind in ("prompt", "generated"))
        drafted = served.metric("step35_drafted_tokens", "0")
        answer = served.generate(text_input=PROMPT, max_tokens=30)
        prompt, generated = prompt + answer["num_input_tokens"], generated + answer["num_output_tokens"]
        if served.settled("step35_tokens", "generated", generated, 5.0) == generated:
            break
    assert served.metric("step35_tokens", "generated") == generated
    assert served.metric("step35_tokens", "prompt") == prompt
    assert served.metric("step35_drafted_tokens", "0") >= drafted
    assert served.metric("step35_requests", "finished") >= 1
    assert served.metric("step35_cache_rows", "free") > 0
