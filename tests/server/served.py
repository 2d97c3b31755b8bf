"""A tritonserver that serves nano from a generated repository, and what a client does with it."""

from __future__ import annotations

import http.client
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

READY_SECONDS = 120.0
GROUP = sys.platform != "win32"


def server_python() -> str:
    """The interpreter whose environment has the server: numpy 1, so rarely that of the tests."""
    beside = Path(sys.prefix) / "server" / "bin" / "python"
    return os.environ.get("STEP35_SERVER_PYTHON") or (str(beside) if beside.exists() else sys.executable)


def missing() -> str:
    """Why no server can be started; empty where one can."""
    try:
        import tritonclient.grpc  # noqa: F401
    except ImportError:
        return "tritonclient is not installed"
    check = "from step35_trt.triton_repo.launch import find_server; find_server()"
    found = subprocess.run([server_python(), "-c", check], capture_output=True, text=True, check=False)
    return (found.stderr.strip().splitlines() or ["no server"])[-1] if found.returncode else ""


@dataclass
class Served:
    """A running server; `stop`, `kill` and `start` end it and begin anew on the same ports."""

    repository: Path
    log: Path
    ports: tuple[int, int, int] = field(default_factory=lambda: free_ports(3))
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        line = [server_python(), "-m", "step35_trt", "serve", str(self.repository)]
        for name, port in zip(("http", "grpc", "metrics"), self.ports, strict=True):
            line += [f"--{name}-port", str(port)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(line, stdout=log, stderr=log, start_new_session=GROUP)
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            try:
                if self.get("/v2/health/ready")[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.2)
        raise AssertionError(self.log.read_text()[-4000:])

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def kill(self) -> None:
        """As the machine would: the server and the process that holds the weights."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.ports[1]}"

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.ports[0], timeout=60)

    def get(self, path: str, port: int = 0) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.ports[port], timeout=60)
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()

    def post(self, path: str, body: object) -> tuple[int, bytes]:
        connection = self.connection()
        connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body))
        response = connection.getresponse()
        return response.status, response.read()

    def generate(self, model: str = "step35", **fields: object) -> dict[str, Any]:
        status, body = self.post(f"/v2/models/{model}/generate", fields)
        assert status == 200, body
        answer: dict[str, Any] = json.loads(body)
        return answer

    def refused(self, **fields: object) -> str:
        status, body = self.post("/v2/models/step35/generate", fields)
        assert status >= 400, (status, body)
        return str(json.loads(body)["error"])

    def events(self, **fields: object) -> list[dict[str, Any]]:
        status, body = self.post("/v2/models/step35/generate_stream", {**fields, "stream": True})
        assert status == 200, body
        return [json.loads(line.removeprefix(b"data: ")) for line in body.splitlines() if line]

    def metric(self, name: str, kind: str) -> float:
        page = self.get("/metrics", 2)[1].decode()
        for line in page.splitlines():
            if line.startswith(f"{name}{{") and f'kind="{kind}"' in line:
                return float(line.rsplit(" ", 1)[1])
        raise AssertionError(f"{name} {kind} is not on the page")

    def settled(self, name: str, kind: str, value: float, seconds: float = 20.0) -> float:
        """The metric once it has reached a value, or after the time."""
        deadline = time.monotonic() + seconds
        while (now := self.metric(name, kind)) != value and time.monotonic() < deadline:
            time.sleep(0.1)
        return now


def free_ports(count: int) -> tuple[int, ...]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = tuple(one.getsockname()[1] for one in sockets)
    for one in sockets:
        one.close()
    return ports


TYPES = {
    **dict.fromkeys(("text_input", "stop_words", "bad_words"), "BYTES"),
    **dict.fromkeys(("temperature", "top_p", "min_p"), "FP32"),
    **dict.fromkeys(("frequency_penalty", "presence_penalty"), "FP32"),
    **dict.fromkeys(("random_seed", "seed"), "UINT64"),
    **dict.fromkeys(("stream", "return_log_probs", "exclude_input_in_output"), "BOOL"),
    **dict.fromkeys(("return_num_input_tokens", "return_num_output_tokens"), "BOOL"),
}
ARRAYS = {"BYTES": object, "FP32": np.float32, "UINT64": np.uint64, "BOOL": np.bool_, "INT32": np.int32}


def tensors(**fields: Any) -> list[Any]:
    """Inputs of a gRPC request, with a batch of 1."""
    import tritonclient.grpc as triton

    made = []
    for name, value in fields.items():
        kind = TYPES.get(name, "INT32")
        items = value if isinstance(value, list | tuple) else [value]
        if kind == "BYTES":
            items = [item if isinstance(item, bytes) else item.encode() for item in items]
        array = np.array([items], dtype=ARRAYS[kind])
        made.append(triton.InferInput(name, list(array.shape), kind))
        made[-1].set_data_from_numpy(array)
    return made


class Stream:
    """One gRPC stream with one request; iterating gives its responses."""

    def __init__(self, address: str, model: str = "step35", **fields: Any) -> None:
        import tritonclient.grpc as triton

        options = {name: fields.pop(name) for name in ("request_id", "priority", "timeout") if name in fields}
        self._queue: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._client = triton.InferenceServerClient(address)
        self._client.start_stream(lambda result, error: self._queue.put((result, error)))
        self._client.async_stream_infer(model, tensors(**fields), enable_empty_final_response=True, **options)

    def __iter__(self) -> Iterator[Any]:
        while True:
            result, error = self._queue.get(timeout=120)
            if error is not None:
                self.close()
                raise error
            if result.get_response().outputs:
                yield result
            if result.get_response().parameters["triton_final_response"].bool_param:
                self.close()
                return

    def cancel(self) -> None:
        self._client.stop_stream(cancel_requests=True)
        self._client.close()

    def close(self) -> None:
        self._client.stop_stream()
        self._client.close()


def joined(results: Sequence[Any]) -> tuple[str, list[int]]:
    """Text and ids of the responses of one request."""
    text = b"".join(result.as_numpy("text_output").item() for result in results).decode()
    return text, [int(i) for result in results for i in result.as_numpy("output_ids").ravel()]
