"""A real tritonserver that serves a bundle as long as a benchmark needs it."""

from __future__ import annotations

import socket
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import TYPE_CHECKING

from step35_trt.triton_repo.write import write_repository

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@dataclass(frozen=True)
class Running:
    """A server.

    Attributes:
        process: Its number.
        address: Where it listens for gRPC.
        http: And for HTTP.
    """

    process: int
    address: str
    http: str


@contextmanager
def server(python: str, bundle: Path, streams: int, folder: Path) -> Iterator[Running]:
    """A server that runs within the context."""
    repository, log = folder / "repository", folder / "log"
    write_repository(bundle, repository, streams)
    ports = dict(zip(("http", "grpc", "metrics"), free_ports(3), strict=True))
    line = [python, "-m", "step35_trt", "serve", str(repository)]
    for name, port in ports.items():
        line += [f"--{name}-port", str(port)]
    with log.open("wb") as stream:
        process = subprocess.Popen(line, stdout=stream, stderr=stream)
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise SystemExit(log.read_text())
            try:
                connection = HTTPConnection("127.0.0.1", ports["http"])
                connection.request("GET", "/v2/health/ready")
                if connection.getresponse().status == 200:
                    break
            except OSError:
                pass
            time.sleep(0.2)
        yield Running(process.pid, f"127.0.0.1:{ports['grpc']}", f"127.0.0.1:{ports['http']}")
    finally:
        process.terminate()
        process.wait(60)


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody uses."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
