"""Clients that cancel or vanish, queues, and servers that die."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest

from step35_trt.triton_repo.host import REPORT_SECONDS
from step35_trt.triton_repo.write import write_repository
from tests.server.served import Served, Stream, joined

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


def test_a_full_engine_leaves_the_queue_to_triton(bundle: Path, tmp_path: Path) -> None:
    """Room for one request and none ahead: the queue's order and its time-outs are the server's."""
    from concurrent.futures import ThreadPoolExecutor

    from tritonclient.utils import InferenceServerException

    write_repository(bundle, tmp_path / "repository", sequences=1)
    config = tmp_path / "repository" / "step35" / "config.pbtxt"
    config.write_text(
        config.read_text().replace(
            '"ahead" value { string_value: "4" }', '"ahead" value { string_value: "0" }'
        )
    )
    server = Served(tmp_path / "repository", tmp_path / "log")
    server.start()
    try:
        blocker = Stream(server.grpc, **LONG, stream=True)
        next(iter(blocker))
        ended: list[str] = []

        def ask(name: str, **options: int) -> None:
            try:
                list(Stream(server.grpc, text_input="Returns", max_tokens=4, **options))
                ended.append(name)
            except InferenceServerException as error:
                ended.append(f"{name}: {error.message()}")

        with ThreadPoolExecutor(8) as pool:
            # The first finds no room, and the second may have left Triton's queue as well before others come.
            pool.submit(ask, "taken")
            time.sleep(0.3)
            pool.submit(ask, "second", priority=3)
            time.sleep(0.3)
            pool.submit(ask, "last", priority=3)
            time.sleep(0.3)
            pool.submit(ask, "first", priority=1)
            pool.submit(ask, "late", timeout=100_000)
            time.sleep(0.5)
            blocker.cancel()
        answered = [name for name in ended if ":" not in name]
        assert sorted(answered) == ["first", "last", "second", "taken"]
        assert answered[0] == "taken"
        assert answered.index("first") < answered.index("last")
        assert [name for name in ended if name.startswith("late: ")]
    finally:
        server.stop()


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
