"""A request that is off gets an error, and the next one works."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.server.served import Stream

if TYPE_CHECKING:
    from tests.server.conftest import Offline
    from tests.server.served import Served

GOOD = {"text_input": "def read(self", "max_tokens": 8}
OFF: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1.0}, "temperature"),
    ({"top_p": 0.0}, "top_p"),
    ({"top_k": -3}, "top_k"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**6}, "max_tokens"),
    ({"end_id": -2}, "end_id"),
    ({"beam_width": 4}, "beam_width"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"stop_words": ["x"] * 17}, "stop_words"),
    ({"stop_words": ["x" * 300]}, "stop_words"),
    ({"bad_words": ["x"] * 17}, "bad_words"),
    ({"temprature": 0.5}, "temprature"),
    ({"priority": 1}, "priority"),
    ({"timeout": -1}, "timeout"),
    ({"input_ids": [1, 2]}, "either"),
    ({"text_input": "x" * 40_000}, "bytes"),
    ({"text_input": "a b " * 2_000}, "tokens"),
    ({"seed": 1, "random_seed": 1}, "seed"),
    ({"return_log_probs": True, "stop_words": ["x"]}, "return_log_probs"),
]


@pytest.mark.parametrize(("change", "named"), OFF)
def test_an_error_names_what_is_off(served: Served, change: dict[str, Any], named: str) -> None:
    assert named in served.refused(**{**GOOD, **change})
    assert served.generate(**GOOD)["num_output_tokens"] == 8


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": float("nan")}, "top_p"),
        ({"text_input": b"\xff\xfe not text"}, "UTF-8"),
        ({"stop_words": [b"\xc3"]}, "UTF-8"),
        ({"text_input": b"y" * (10 << 20)}, "bytes"),
    ],
)
def test_what_json_cannot_say_is_an_error_too(served: Served, fields: dict[str, Any], named: str) -> None:
    from tritonclient.utils import InferenceServerException

    with pytest.raises(InferenceServerException, match=named):
        list(Stream(served.grpc, **{**GOOD, **fields}))
    assert served.generate(**GOOD)["num_output_tokens"] == 8


@pytest.mark.parametrize(
    "ids", [[-1, 5], [5, 10**9], [2**31 - 1], []], ids=["negative", "beyond", "largest", "none"]
)
def test_ids_that_are_none_are_an_error(served: Served, ids: list[int]) -> None:
    from tritonclient.utils import InferenceServerException

    fields = {"input_ids": ids, "input_lengths": len(ids), "request_output_len": 4}
    for model in ("step35", "step35_tokens"):
        with pytest.raises(InferenceServerException):
            list(Stream(served.grpc, model, **fields))
    with pytest.raises(InferenceServerException, match="input_lengths"):
        list(Stream(served.grpc, input_ids=[3, 4], input_lengths=-2, request_output_len=4))
    assert served.generate(**GOOD)["num_output_tokens"] == 8


def test_a_wrong_type_or_shape_is_the_servers_error(served: Served) -> None:
    import numpy as np
    import tritonclient.grpc as triton
    from tritonclient.utils import InferenceServerException

    client = triton.InferenceServerClient(served.grpc)
    for name, kind, array in (
        ("max_tokens", "INT64", np.array([[4]])),
        ("temperature", "FP64", np.array([[0.5]])),
        ("text_input", "INT32", np.array([[1]], dtype=np.int32)),
        ("max_tokens", "INT32", np.array([[4, 5]], dtype=np.int32)),
        ("input_ids", "INT32", np.array([[4, 5], [6, 7]], dtype=np.int32)),
    ):
        wrong = triton.InferInput(name, list(array.shape), kind)
        wrong.set_data_from_numpy(array)
        errors: list[Any] = []
        client.start_stream(lambda result, error, errors=errors: errors.append(error or result))
        client.async_stream_infer("step35", [wrong])
        client.stop_stream()
        assert isinstance(errors[0], InferenceServerException), name
    for body in (b"", b"{", b'{"text_input": 5}', b'{"text_input": "x", "max_tokens": "many"}', b"[1]"):
        assert served.post("/v2/models/step35/generate", body)[0] >= 400
    assert served.generate(**GOOD)["num_output_tokens"] == 8


def test_a_path_in_a_request_is_text(served: Served, offline: Offline) -> None:
    prompt = "../../../../etc/passwd\x00"
    assert served.generate(text_input=prompt, max_tokens=6)["text_output"] == offline.answer(prompt, 6).text
    assert served.post("/v2/models/..%2f..%2fetc%2fpasswd/generate", GOOD)[0] >= 400
