"""A real tritonserver under load: every answer checked, throughput against the same load without a server.

    python -m benchmarks.server BUNDLE [--rounds 8] [--requests 128] [--streams 32]

A load is a list of requests, `streams` of them open at any time, from the first request to the last answer.
It goes through the serving loop in a process of its own and to a server that hosts the same loop, for whole
answers and for streams: alone, whole, alone, streams, and so on. A load of the server is compared with the
mean of those before and after it, so that a machine whose speed drifts slows both. All run on the same cores:
the clients' and the server's own work comes out of the server's throughput. So each kind of load is made by
one cheap thread, which asks anew when an answer is complete; the server's clients have a connection each. The
cores that clients, server and loop keep busy are part of the report.

Needs `tritonclient` here and a server in the environment of `STEP35_SERVER_PYTHON`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import queue
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from itertools import cycle, islice, pairwise
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.triton_server import server
from step35_trt.bundle import Bundle
from step35_trt.runtime.load import load_text, open_bundle
from step35_trt.runtime.scheduling.requests import Limits, TokenRequest, Tokens
from step35_trt.runtime.scheduling.serving import ServingLoop

if TYPE_CHECKING:
    from collections.abc import Callable

    from step35_trt.runtime.scheduling.requests import Event

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

Request = tuple[tuple[int, ...], int]  # prompt and tokens to generate


@dataclass
class Answer:
    """What one request got, as it arrives.

    Attributes:
        request: What was asked.
        asked: When.
        first: Seconds to the first token.
        token_ids: So far.
    """

    request: Request
    asked: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    token_ids: list[int] = field(default_factory=list)

    def take(self, token_ids: list[int]) -> None:
        """The next tokens."""
        self.first = self.first or time.perf_counter() - self.asked
        self.token_ids += token_ids


@dataclass(frozen=True)
class Load:
    """What came of a load.

    Attributes:
        tokens: Generated in all.
        seconds: From the first request to the last answer.
        answers: Finished requests.
        wrong: Those whose tokens are not the expected ones.
        first: Median seconds to the first token.
        busy: Cores kept busy, by who did: 'loop' or 'server', and 'clients'.
    """

    tokens: int
    seconds: float
    answers: int
    wrong: int
    first: float
    busy: dict[str, float]

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


def measured(
    ask: Callable[[list[Request]], list[Answer]],
    requests: list[Request],
    expected: dict[Request, list[int]],
    processes: dict[str, int],
) -> Load:
    """Time a load; `processes` are those whose work is reported."""
    before = {name: processor_seconds(process) for name, process in processes.items()}
    started = time.perf_counter()
    answers = ask(requests)
    seconds = time.perf_counter() - started
    return Load(
        tokens=sum(len(answer.token_ids) for answer in answers),
        seconds=seconds,
        answers=len(answers),
        wrong=sum(answer.token_ids != expected[answer.request] for answer in answers),
        first=median(answer.first for answer in answers),
        busy={name: (processor_seconds(processes[name]) - then) / seconds for name, then in before.items()},
    )


def processor_seconds(process: int) -> float:
    """Of a process; for another one than this, also of those it has started."""
    total = 0.0
    for task in Path(f"/proc/{process}/task").iterdir():
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        if process != os.getpid():
            total += sum(processor_seconds(int(child)) for child in (task / "children").read_text().split())
    return total


def through_loop(
    loop: ServingLoop, stop_ids: tuple[int, ...], streams: int, requests: list[Request]
) -> list[Answer]:
    """A load on the bare loop."""
    waiting, done = iter(requests), list[Answer]()
    over: queue.SimpleQueue[Answer] = queue.SimpleQueue()

    def sink(answer: Answer, event: Event) -> None:
        if isinstance(event, Tokens):
            answer.take(list(event.token_ids))
        else:
            over.put(answer)

    def ask(request: Request) -> None:
        tokens = TokenRequest(request[0], request[1], stop_ids=stop_ids)
        loop.submit(tokens, partial(sink, Answer(request)))

    for request in islice(waiting, streams):
        ask(request)
    while len(done) < len(requests):
        done.append(over.get())
        for request in islice(waiting, 1):
            ask(request)
    return done


def alone(bundle: Path, streams: int, requests: list[Request]) -> None:
    """Print the bare loop's answers, got one at a time, then a load on it for every line that is read."""
    session = open_bundle(bundle)
    with ServingLoop(session, Limits(sequences=streams)) as loop:
        ask = partial(through_loop, loop, tuple(session.config.eos_token_id))
        kinds = list(dict.fromkeys(requests))
        answers = {answer.request: answer.token_ids for answer in ask(1, kinds)}
        print(json.dumps([answers[request] for request in kinds]), flush=True)
        while sys.stdin.readline():
            load = measured(partial(ask, streams), requests, answers, {"loop": os.getpid()})
            print(json.dumps(vars(load)), flush=True)


class Clients:
    """Clients of a server on one thread, each with a connection and a stream that stay open."""

    def __init__(self, events: asyncio.AbstractEventLoop, address: str, streams: int, stream: bool) -> None:
        from tritonclient.grpc import service_pb2

        self._aio = import_module("grpc.aio")

        self._messages = service_pb2
        self._stream = stream
        self._made: dict[Request, bytes] = {}
        self._events = events
        own = [("grpc.use_local_subchannel_pool", 1)]

        async def connect() -> None:
            self._channels = [self._aio.insecure_channel(address, options=own) for _ in range(streams)]
            self._calls = [
                channel.stream_stream(
                    "/inference.GRPCInferenceService/ModelStreamInfer",
                    response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
                )()
                for channel in self._channels
            ]

        self._events.run_until_complete(connect())

    def ask(self, requests: list[Request]) -> list[Answer]:
        """A load on the server."""
        for request in requests:
            self._made[request] = self._message(request)
        waiting, done = iter(requests), list[Answer]()

        async def client(call: Any) -> None:
            for request in waiting:
                await call.write(self._made[request])
                done.append(await self._answer(call, Answer(request)))

        async def clients() -> None:
            await asyncio.gather(*map(client, self._calls))

        self._events.run_until_complete(clients())
        return done

    async def _answer(self, call: Any, answer: Answer) -> Answer:
        while True:
            reply = await call.read()
            if reply.error_message:
                raise SystemExit(reply.error_message)
            response = reply.infer_response
            for raw in response.raw_output_contents:
                answer.take(np.frombuffer(raw, np.int32).tolist())
            if response.parameters["triton_final_response"].bool_param:
                return answer

    def _message(self, request: Request) -> bytes:
        made = self._messages.ModelInferRequest(model_name="step35")
        made.parameters["triton_enable_empty_final_response"].bool_param = True
        made.outputs.add(name="output_ids")
        for name, kind, array in (
            ("input_ids", "INT32", np.array([request[0]], np.int32)),
            ("max_tokens", "INT32", np.array([[request[1]]], np.int32)),
            ("stream", "BOOL", np.array([[self._stream]])),
        ):
            made.inputs.add(name=name, datatype=kind, shape=array.shape)
            made.raw_input_contents.append(array.tobytes())
        message: bytes = made.SerializeToString()
        return message

    def close(self) -> None:
        """End the streams."""

        async def end() -> None:
            for call in self._calls:
                await call.done_writing()
                assert await call.read() is self._aio.EOF
                await call.code()
            for channel in self._channels:
                await channel.close()

        self._events.run_until_complete(end())


def make_requests(bundle: Path, count: int) -> list[Request]:
    """Prompts with answers of different lengths; prompts are random ids where the bundle has no tokenizer."""
    text = load_text(bundle, required=False)
    if text is not None:
        prompts = [tuple(text.encode(prompt)) for prompt in PROMPTS]
    else:
        ids, chosen = range(Bundle.open(bundle).config.vocab_size), random.Random(0)
        prompts = [tuple(chosen.choices(ids, k=4 + 2 * place)) for place in range(len(PROMPTS))]
    kinds = [(prompt, 32 + 16 * (place % 5)) for place, prompt in enumerate(prompts * 3)]
    return list(islice(cycle(kinds), count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    requests = make_requests(options.bundle, options.requests)
    if options.alone:
        alone(options.bundle, options.streams, requests)
        return
    python = os.environ.get("STEP35_SERVER_PYTHON", sys.executable)
    line = [python, "-m", "benchmarks.server", str(options.bundle), "--alone"]
    line += ["--streams", str(options.streams), "--requests", str(options.requests)]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as offline,
        server(python, options.bundle, options.streams, Path(folder)) as running,
    ):
        assert offline.stdin is not None
        assert offline.stdout is not None
        expected = dict(zip(dict.fromkeys(requests), json.loads(offline.stdout.readline()), strict=True))
        events = asyncio.new_event_loop()
        clients = {
            name: Clients(events, running.address, options.streams, stream)
            for name, stream in (("server, whole answers", False), ("server, streaming", True))
        }
        processes = {"server": running.process, "clients": os.getpid()}

        def without() -> Load:
            print(file=offline.stdin, flush=True)
            assert offline.stdout is not None
            return Load(**json.loads(offline.stdout.readline()))

        bare = [without()]
        served: dict[str, list[Load]] = {name: [] for name in clients}
        for _ in range(options.rounds):
            for name, one in clients.items():
                served[name].append(measured(one.ask, requests, expected, processes))
                bare.append(without())
        for one in clients.values():
            one.close()
        offline.stdin.close()
    print(
        f"{options.rounds} rounds of {options.requests} requests, {options.streams} at a time, "
        f"{os.cpu_count()} cores"
    )
    show("serving loop alone", bare)
    for turn, (name, loads) in enumerate(served.items()):
        around = list(pairwise(bare))[turn :: len(served)]
        show(name, loads)
        compare(loads, around)


def show(name: str, loads: list[Load]) -> None:
    """A line of the report: medians over the rounds."""
    rates = sorted(load.rate for load in loads)
    busy = ", ".join(f"{who} {median(load.busy[who] for load in loads):.2f}" for who in loads[0].busy)
    first = median(load.first for load in loads) * 1e3
    answers, wrong = sum(load.answers for load in loads), sum(load.wrong for load in loads)
    print(
        f"{name:22} {median(rates):5.0f} tokens/s ({rates[0]:.0f} to {rates[-1]:.0f}), first token after "
        f"{first:.0f} ms, {answers} answers, {wrong} wrong; busy cores: {busy}"
    )


def compare(loads: list[Load], around: list[tuple[Load, Load]]) -> None:
    """A line of the report: loads of the server and those of the bare loop before and after each."""
    pairs = list(zip(loads, around, strict=True))
    ratios = sorted(load.rate / mean((before.rate, after.rate)) for load, (before, after) in pairs)
    later = median(load.first - mean((before.first, after.first)) for load, (before, after) in pairs)
    print(
        f"{'':22} {median(ratios):.2f} of the loop alone ({ratios[0]:.2f} to {ratios[-1]:.2f}), first token "
        f"{later * 1e3:+.0f} ms (a whole answer's first token comes with the last)"
    )


if __name__ == "__main__":
    main()
