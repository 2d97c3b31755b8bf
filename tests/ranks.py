"""Bundles for several processes on one CPU, and the processes."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import socket
import sys
from typing import TYPE_CHECKING, Any

from step35_trt.__main__ import main
from step35_trt.build import build
from step35_trt.engine import EngineSpec
from tests.synthetic import raw_config, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.process import BaseProcess
    from pathlib import Path

HOST: dict[str, Any] = {
    "name": "processes of one machine",
    "memory": 16_000_000_000,
    "unified": True,
    "bandwidth": 20e9,
    "operations": {"fp32": 1e11},
    "link": {"name": "loopback", "bandwidth": 1e9},
}
# A clean process that has torch, of which ranks are forked: importing it takes longer than all they do.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "step35_trt.cli",
        "step35_trt.commands.benching",
        "step35_trt.commands.examining",
        "step35_trt.verify",
        "tests.device_lives",
        "torch._dynamo",  # comes with the first mode that looks at operations
    ]
)


def shareable(out: Path) -> Path:
    """A checkpoint with heads, experts and widths that four ranks can share."""
    return write_checkpoint(out, raw_config(groups=4, vocab_size=96, layers=5))


def shared_bundle(
    checkpoint: Path, out: Path, ranks: int, recipe: str = "fp32", chunk: int = 16, **parallelism: str
) -> Path:
    """A bundle of `checkpoint` for so many ranks; of `parallelism` what is not named is replicated."""
    ways = {"attention": "replicated", "mlp": "replicated", "head": "replicated"} | parallelism
    spec = {
        "name": "ranks",
        "summary": "For a test.",
        "target": "torch",
        "hardware": HOST,
        "devices": ranks,
        "parallelism": ways,
        "recipe": recipe,
        "prefill_chunk": chunk,
        "max_sequences": 3,
    }
    build(checkpoint, out, EngineSpec.model_validate(spec))
    return out


def places(ranks: int) -> list[dict[str, str]]:
    """What torchrun says to each of `ranks` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def run_ranks(ranks: int, work: Callable[..., None], *arguments: object) -> list[int | None]:
    """Call `work` in each of `ranks` processes; their exit codes."""
    processes = [_fork(place, work, *arguments) for place in places(ranks)]
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


class Started:
    """The command line `step35-trt words` in a process of its own, at a place that torchrun would give.

    Attributes:
        process: It.
    """

    def __init__(self, words: Sequence[object], place: dict[str, str], said: Path) -> None:
        self._said = said / f"out-{place['RANK']}", said / f"err-{place['RANK']}"
        self.process = _fork(place, _command, [str(word) for word in words], *self._said)

    def end(self, seconds: float) -> tuple[int | None, str, str]:
        """Exit code, standard output and standard error, once it has ended."""
        self.process.join(seconds)
        out, err = (path.read_text() for path in self._said)
        return self.process.exitcode, out, err


def _fork(place: dict[str, str], work: Callable[..., None], *arguments: object) -> BaseProcess:
    process = _SERVER.Process(target=_placed, args=(place, work, arguments), daemon=True)
    process.start()
    return process


def _placed(place: dict[str, str], work: Callable[..., None], arguments: tuple[object, ...]) -> None:
    os.environ.update(place)
    work(*arguments)


def _command(words: list[str], out: Path, err: Path) -> None:
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), stream)
    sys.argv = ["step35-trt", *words]
    try:
        main()
    finally:
        atexit._run_exitfuncs()  # which a forked process leaves out
