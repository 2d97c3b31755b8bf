"""How soon a place is free again when a request is cancelled or its client has gone.

    python -m benchmarks.cancelling BUNDLE [--times 10] [--streams 32]

First in a serving loop alone: requests are cancelled at random moments of their steps. Then through a server,
of one place and of many, that are all taken: one more request waits, a client leaves, and the time runs until
the waiting request has its token. What such a request takes where a place is free is measured beside it.
Clients leave in three ways: by gRPC's cancellation, by being killed, and by closing an HTTP connection.

Needs what `benchmarks/server.py` needs.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import subprocess
import sys
import tempfile
import time
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.server import make_requests
from benchmarks.triton_server import Running, server
from step35_trt.runtime.load import open_bundle
from step35_trt.runtime.scheduling.requests import Finished, Limits, TokenRequest
from step35_trt.runtime.scheduling.serving import ServingLoop

if TYPE_CHECKING:
    from collections.abc import Callable

    from step35_trt.runtime.scheduling.requests import Event

    Leave = Callable[[], None]

LONG = 1500  # tokens, more than are generated before a client leaves
QUEUED_SECONDS = 0.3  # for a request to reach its place, or the queue for one


class Open:
    """A request over gRPC that is not waited for."""

    def __init__(self, address: str, ids: list[int], tokens: int = LONG) -> None:
        import tritonclient.grpc as triton

        inputs = []
        for name, values in (("input_ids", ids), ("max_tokens", [tokens]), ("end_id", [-1])):
            inputs.append(triton.InferInput(name, [1, len(values)], "INT32"))
            inputs[-1].set_data_from_numpy(np.array([values], np.int32))
        self.ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._client = triton.InferenceServerClient(address)
        self._client.start_stream(lambda result, error: self.ended.put(error))
        wanted = [triton.InferRequestedOutput("output_ids")]
        self._client.async_stream_infer("step35", inputs, outputs=wanted)

    def wait(self) -> None:
        """Until it is answered."""
        if (error := self.ended.get(timeout=60)) is not None:
            raise error
        self._client.stop_stream()
        self._client.close()

    def cancel(self) -> None:
        """Leave it."""
        self._client.stop_stream(cancel_requests=True)
        self._client.close()


def who_cancels(running: Running, ids: list[int]) -> Leave:
    """A client over gRPC; what it returns cancels its request."""
    return Open(running.address, ids).cancel


def who_is_killed(running: Running, ids: list[int]) -> Leave:
    """The same as a process, which is killed."""
    line = [sys.executable, "-m", "benchmarks.cancelling", "--client", running.address, *map(str, ids)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process.kill


def who_closes(running: Running, ids: list[int]) -> Leave:
    """A client that streams over HTTP and closes its connection.

    One that waits for a whole answer is not noticed: while it makes one the server does not read.
    """
    connection = HTTPConnection(running.http)
    body = {"input_ids": ids, "max_tokens": LONG, "end_id": -1, "stream": True}
    connection.request("POST", "/v2/models/step35/generate_stream", json.dumps(body))
    response = connection.getresponse()

    def leave() -> None:
        response.close()
        connection.close()

    return leave


def in_loop(bundle: Path, ids: list[int], times: int) -> None:
    """Print how soon a loop alone is rid of a cancelled request."""
    session = open_bundle(bundle)
    seconds, steps, step = [], [], []
    with ServingLoop(session, Limits(sequences=1)) as loop:
        events: queue.SimpleQueue[tuple[Event, int]] = queue.SimpleQueue()
        for _ in range(times):
            handle = loop.submit(
                TokenRequest(ids, LONG), lambda event: events.put((event, loop.metrics().steps))
            )
            first, began = events.get()[1], time.perf_counter()
            time.sleep(random.random())
            before, left = loop.metrics().steps, time.perf_counter()
            handle.cancel()
            while not isinstance((last := events.get())[0], Finished):
                pass
            seconds.append(time.perf_counter() - left)
            steps.append(last[1] - before)
            step.append((left - began) / (before - first))
    print(
        f"in the loop: over after {median(seconds) * 1e3:.2f} ms (at most {max(seconds) * 1e3:.2f}), at most "
        f"{max(steps)} steps ended meanwhile, of {median(step) * 1e3:.2f} ms; {times} times"
    )


def freed(
    running: Running, ids: list[int], take: Callable[[Running, list[int]], Leave], times: int
) -> tuple[list[float], list[float]]:
    """Seconds to a request's token: after a client leaves that has the last place, and where one is free."""
    left, free = [], []
    for _ in range(times):
        began = time.perf_counter()
        Open(running.address, ids, 1).wait()
        free.append(time.perf_counter() - began)
        leave = take(running, ids)
        time.sleep(QUEUED_SECONDS)
        waiting = Open(running.address, ids, 1)
        time.sleep(QUEUED_SECONDS)
        assert waiting.ended.empty(), "there was a free place"
        began = time.perf_counter()
        leave()
        waiting.wait()
        left.append(time.perf_counter() - began)
    return left, free


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--client", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        client = Open(options.client[0], [int(i) for i in options.client[1:]])
        print(flush=True)
        client.wait()
        return
    ids = list(make_requests(options.bundle, 1)[0][0])
    in_loop(options.bundle, ids, options.times)
    python = os.environ.get("STEP35_SERVER_PYTHON", sys.executable)
    ways = {"cancels": who_cancels, "is killed": who_is_killed, "closes HTTP": who_closes}
    for places in (1, options.streams):
        with (
            tempfile.TemporaryDirectory() as folder,
            server(python, options.bundle, places, Path(folder)) as running,
        ):
            for name, take in ways.items():
                others = [Open(running.address, ids) for _ in range(places - 1)]
                left, free = freed(running, ids, take, options.times)
                for other in others:
                    other.cancel()
                print(
                    f"{places:2} places, a client {name:11}: the next one's token after "
                    f"{median(left) * 1e3:4.0f} ms (at most {max(left) * 1e3:.0f}), where a place is free "
                    f"{median(free) * 1e3:.0f} ms; {options.times} times",
                    flush=True,
                )


if __name__ == "__main__":
    main()
