"""A real tritonserver under load: every answer checked, throughput against the same load without a server.

    python -m benchmarks.server BUNDLE [--rounds 10] [--seconds 6] [--streams 32]

The same requests go, `streams` at a time, to the serving loop in a process of its own and to a server that
hosts it, over one gRPC stream each: in turns, so that a change of the machine's speed meets both. All run on
the same cores, so the clients' and the server's work comes out of the server's throughput. Needs
`tritonclient` here and a server in the environment of `STEP35_SERVER_PYTHON`.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from step35_trt.runtime.load import load_text, open_bundle
from step35_trt.runtime.requests import Limits, TokenRequest, Tokens
from step35_trt.runtime.serving import ServingLoop
from step35_trt.triton_repo.write import write_repository

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from step35_trt.runtime.requests import Event

PROMPTS = (
    "def read(self, size=-1):",
    "The import statement",
    "class Meta:\n    ",
    "Returns the",
    "for i in range(",
    "import os\nimport sys\n",
    "    def __init__(self, name, value):\n",
    "Changed in version 3.8:",
)
PORTS = {"http": 18100, "grpc": 18101, "metrics": 18102}

Job = tuple[tuple[int, ...], int]  # prompt and tokens to generate
Outcome = tuple[list[int], float]  # token ids and seconds to the first of them


@dataclass(frozen=True)
class Load:
    """What came of a load.

    Attributes:
        tokens: Generated in all.
        seconds: From the first request to the last answer.
        answers: Finished requests.
        wrong: Those whose tokens are not the expected ones.
        first: Median seconds to the first token.
    """

    tokens: int
    seconds: float
    answers: int
    wrong: int
    first: float

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


def closed_loop(
    ask: Callable[[int, Job], Outcome],
    jobs: list[Job],
    streams: int,
    seconds: float,
    expected: dict[Job, list[int]],
) -> Load:
    """Let `streams` clients ask one request after the other until the time is up."""
    started = time.perf_counter()
    done: list[list[tuple[Job, Outcome]]] = [[] for _ in range(streams)]

    def client(number: int) -> None:
        turn = number
        while time.perf_counter() - started < seconds:
            job = jobs[turn % len(jobs)]
            done[number].append((job, ask(number, job)))
            turn += 1

    with ThreadPoolExecutor(streams) as pool:
        list(pool.map(client, range(streams)))
    elapsed = time.perf_counter() - started
    outcomes = [outcome for one in done for outcome in one]
    return Load(
        tokens=sum(len(ids) for _, (ids, _) in outcomes),
        seconds=elapsed,
        answers=len(outcomes),
        wrong=sum(ids != expected[job] for job, (ids, _) in outcomes),
        first=median(first for _, (_, first) in outcomes),
    )


def in_process(bundle: Path, streams: int, seconds: float) -> None:
    """The load on the bare loop: prints the answers to each job, then a load for every line it reads."""
    jobs = make_jobs(bundle)
    session = open_bundle(bundle)
    answers: dict[Job, list[int]] = {}
    with ServingLoop(session, Limits(sequences=streams)) as loop:

        def ask(_: int, job: Job) -> Outcome:
            events: queue.SimpleQueue[Event] = queue.SimpleQueue()
            started = time.perf_counter()
            request = TokenRequest(job[0], job[1], stop_ids=session.config.eos_token_id)
            loop.submit(request, events.put)
            ids: list[int] = []
            first = 0.0
            while isinstance(event := events.get(), Tokens):
                first = first or time.perf_counter() - started
                ids += event.token_ids
            return ids, first

        for job in jobs:  # one at a time: what the others are compared with
            answers[job] = ask(0, job)[0]
        print(json.dumps([answers[job] for job in jobs]), flush=True)
        while sys.stdin.readline():
            print(json.dumps(vars(closed_loop(ask, jobs, streams, seconds, answers))), flush=True)


class GrpcClients:
    """One gRPC stream for each client, kept open."""

    def __init__(self, address: str, streams: int, stream: bool) -> None:
        import tritonclient.grpc as triton

        self._triton = triton
        self._stream = stream
        self._queues: list[queue.SimpleQueue[tuple[Any, Any]]] = []
        self._clients = []
        for _ in range(streams):
            self._queues.append(queue.SimpleQueue())
            client = triton.InferenceServerClient(address)
            put = self._queues[-1].put
            client.start_stream(lambda result, error, put=put: put((result, error)))
            self._clients.append(client)

    def ask(self, number: int, job: Job) -> Outcome:
        """One request over a client's stream."""
        import numpy as np

        triton = self._triton
        arrays = {
            "input_ids": np.array([job[0]], np.int32),
            "max_tokens": np.array([[job[1]]], np.int32),
            "stream": np.array([[self._stream]]),
        }
        inputs = []
        for name, array in arrays.items():
            kind = "BOOL" if array.dtype == bool else "INT32"
            inputs.append(triton.InferInput(name, list(array.shape), kind))
            inputs[-1].set_data_from_numpy(array)
        started = time.perf_counter()
        self._clients[number].async_stream_infer(
            "step35", inputs, outputs=[triton.InferRequestedOutput("output_ids")],
            enable_empty_final_response=True,
        )  # fmt: skip
        ids: list[int] = []
        first = 0.0
        while True:
            result, error = self._queues[number].get()
            if error is not None:
                raise error
            response = result.get_response()
            for raw in response.raw_output_contents:
                first = first or time.perf_counter() - started
                ids += np.frombuffer(raw, np.int32).tolist()
            if response.parameters["triton_final_response"].bool_param:
                return ids, first

    def close(self) -> None:
        """End the streams."""
        for client in self._clients:
            client.stop_stream()


def make_jobs(bundle: Path) -> list[Job]:
    """Prompts with answers of different lengths."""
    text = load_text(bundle, required=True)
    assert text is not None
    return [(tuple(text.encode(p)), 32 + 16 * (i % 5)) for i, p in enumerate(PROMPTS * 3)]


def server(python: str, bundle: Path, streams: int, folder: Path) -> Iterator[None]:
    """A running server."""
    repository, log = folder / "repository", folder / "log"
    write_repository(bundle, repository, streams)
    line = [python, "-m", "step35_trt", "serve", str(repository)]
    for name, port in PORTS.items():
        line += [f"--{name}-port", str(port)]
    with log.open("wb") as stream:
        process = subprocess.Popen(line, stdout=stream, stderr=stream)
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise SystemExit(log.read_text())
            try:
                connection = HTTPConnection("127.0.0.1", PORTS["http"])
                connection.request("GET", "/v2/health/ready")
                if connection.getresponse().status == 200:
                    break
            except OSError:
                pass
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_process:
        in_process(options.bundle, options.streams, options.seconds)
        return
    python = os.environ.get("STEP35_SERVER_PYTHON", sys.executable)
    line = [python, "-m", "benchmarks.server", str(options.bundle), "--in-process"]
    line += ["--streams", str(options.streams), "--seconds", str(options.seconds)]
    jobs = make_jobs(options.bundle)
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as alone,
        contextmanager(server)(python, options.bundle, options.streams, Path(folder)),
    ):
        assert alone.stdin is not None
        assert alone.stdout is not None
        expected = dict(zip(jobs, json.loads(alone.stdout.readline()), strict=True))
        loads: dict[str, list[Load]] = {"serving loop alone": []}
        clients = {
            name: GrpcClients(f"127.0.0.1:{PORTS['grpc']}", options.streams, stream)
            for name, stream in (("server, whole answers", False), ("server, streaming", True))
        }
        for _ in range(options.rounds):
            print(file=alone.stdin, flush=True)
            loads["serving loop alone"].append(Load(**json.loads(alone.stdout.readline())))
            for name, ask in clients.items():
                load = closed_loop(ask.ask, jobs, options.streams, options.seconds, expected)
                loads.setdefault(name, []).append(load)
        for client in clients.values():
            client.close()
        alone.stdin.close()
    rounds = f"{options.rounds} rounds of {options.seconds:.0f} s"
    print(f"{options.streams} clients, {rounds}, {os.cpu_count()} cores")
    for name, taken in loads.items():
        show(name, taken, loads["serving loop alone"])


def show(name: str, loads: list[Load], alone: list[Load]) -> None:
    """One line of the report: medians over the rounds, and of the ratios within a round."""
    rate = median(load.rate for load in loads)
    ratio = median(load.rate / other.rate for load, other in zip(loads, alone, strict=True))
    first = median(load.first for load in loads)
    later = median(load.first - other.first for load, other in zip(loads, alone, strict=True))
    print(
        f"{name:22} {rate:6.0f} tokens/s ({ratio:.2f}x), first token after {first * 1e3:.1f} ms "
        f"({later * 1e3:+.1f} ms), {sum(load.answers for load in loads)} answers, "
        f"{sum(load.wrong for load in loads)} wrong"
    )


if __name__ == "__main__":
    main()
