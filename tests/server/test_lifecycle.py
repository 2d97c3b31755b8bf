"""Clients that cancel or vanish, queues, and servers that die."""

from __future__ import annotations

import json
import queue
import time
from typing import TYPE_CHECKING

import pytest

from step35_trt.triton_repo.host import REPORT_SECONDS
from step35_trt.triton_repo.write import write_repository
from tests.server.served import Served, Stream, joined, tensors

if TYPE_CHECKING:
    from pathlib import Path

    from tests.server.conftest import Offline

LONG = {"text_input": "def read(self, size=-1):", "max_tokens": 1500, "end_id": -1}


def test_cancelling_a_stream_frees_its_sequence(served: Served) -> None:
    time.sleep(3 * REPORT_SECONDS)  # what other tests did is on the page
    cancelled = served.metric("step35_requests", "cancelled")
    stream = Stream(served.grpc, **LONG, stream=True)
    next(iter(stream))
    stream.cancel()
    assert served.settled("step35_requests", "cancelled", cancelled + 1, 5) == cancelled + 1
    assert served.settled("step35_open_requests", "running", 0, 1) == 0


def test_a_client_that_vanishes_costs_nothing(served: Served, offline: Offline) -> None:
    time.sleep(3 * REPORT_SECONDS)
    cancelled = served.metric("step35_requests", "cancelled")
    generated = served.metric("step35_tokens", "generated")
    connections = []
    for _ in range(4):
        connection = served.connection()
        connection.request(
            "POST",
            "/v2/models/step35/generate_stream",
            json.dumps({**LONG, "stream": True}),
        )
        connection.getresponse().read(20)
        connections.append(connection)
    for connection in connections:
        assert connection.sock is None or connection.sock.close() is None
    del connections, connection
    assert served.settled("step35_requests", "cancelled", cancelled + 4, 10) == cancelled + 4
    assert served.metric("step35_tokens", "generated") < generated + 4 * LONG["max_tokens"]
    answer = served.generate(text_input="Returns the", max_tokens=12)
    assert answer["output_ids"] == offline.answer("Returns the", 12).token_ids


def test_time_is_up(served: Served) -> None:
    from tritonclient.utils import InferenceServerException

    with pytest.raises(InferenceServerException, match="time was up"):
        list(Stream(served.grpc, **LONG, stream=True, timeout=60_000))
    assert "time was up" in served.refused(**LONG, timeout=60_000)
    assert served.settled("step35_open_requests", "running", 0, 5) == 0


def queued(server: Served) -> float:
    """Requests that Triton has not handed over."""
    page = server.get("/metrics", 2)[1].decode()
    name = 'nv_inference_pending_request_count{model="step35"'
    return sum(float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line.startswith(name))


def until_queued(server: Served, count: int) -> None:
    deadline = time.monotonic() + 20
    while queued(server) != count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert queued(server) == count


def test_a_full_engine_leaves_the_queue_to_triton(bundle: Path, tmp_path: Path) -> None:
    """Room for one request and none ahead: the queue's order and its time-outs are the server's."""
    import tritonclient.grpc as triton

    write_repository(bundle, tmp_path / "repository", sequences=1)
    config = tmp_path / "repository" / "step35" / "config.pbtxt"
    written = config.read_text()
    ahead = written.replace('"ahead" value { string_value: "4" }', '"ahead" value { string_value: "0" }')
    assert ahead != written
    config.write_text(ahead)
    server = Served(tmp_path / "repository", tmp_path / "log")
    server.start()
    # One stream for all: its responses come in the order in which the server gives them. Clients of their own
    # are woken in any order.
    answers: queue.Queue[str] = queue.Queue()
    client = triton.InferenceServerClient(server.grpc)

    def ask(name: str, **options: int) -> None:
        inputs = tensors(text_input="Returns", max_tokens=4)
        client.async_stream_infer("step35", inputs, request_id=name, **options)

    try:
        assert client.is_server_ready()  # a connection may take a second to be made
        client.start_stream(
            lambda result, error: answers.put(f"late: {error}" if error else result.get_response().id)
        )
        # Drawn from flat probabilities, so that drafts are refused and it takes longer than the test.
        blocker = Stream(
            server.grpc, **{**LONG, "max_tokens": 2000}, temperature=2.0, random_seed=1, stream=True
        )
        next(iter(blocker))
        ask("taken")  # finds no room, and the next may have left Triton's queue as well before others come
        time.sleep(0.3)
        for count, (name, priority) in enumerate([("second", 3), ("last", 3), ("first", 1)], 1):
            ask(name, priority=priority)
            until_queued(server, count)
        ask("late", timeout=100_000)
        until_queued(server, 4)
        time.sleep(0.2)
        blocker.cancel()
        ended = [answers.get(timeout=60) for _ in range(5)]
        [late] = [name for name in ended if name.startswith("late: ")]
        assert "timeout" in late.lower(), late
        answered = [name for name in ended if name != late]
        assert sorted(answered) == ["first", "last", "second", "taken"]
        assert answered[0] == "taken"
        assert answered.index("first") < answered.index("last")
    finally:
        server.kill()  # whatever failed: requests may be open, and their clients would wait
        client.close()


def test_a_killed_server_serves_again(bundle: Path, tmp_path: Path, offline: Offline) -> None:
    from tritonclient.utils import InferenceServerException

    write_repository(bundle, tmp_path / "repository")
    server = Served(tmp_path / "repository", tmp_path / "log")
    server.start()
    stream = iter(Stream(server.grpc, **LONG, stream=True))
    next(stream)
    server.kill()
    with pytest.raises(InferenceServerException):
        list(stream)
    server.start()
    again = joined(list(Stream(server.grpc, text_input="Returns the", max_tokens=12, stream=True)))
    expected = offline.answer("Returns the", 12)
    assert again == (expected.text, expected.token_ids)
    assert server.stop() == 0
