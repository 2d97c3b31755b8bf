"""Bundles for several processes on one CPU, and the processes."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from step35_trt.build import build
from step35_trt.engine import EngineSpec
from tests.synthetic import raw_config, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HOST: dict[str, Any] = {
    "name": "processes of one machine",
    "memory": 16_000_000_000,
    "unified": True,
    "bandwidth": 20e9,
    "operations": {"fp32": 1e11},
    "link": {"name": "loopback", "bandwidth": 1e9},
}
COMMAND = [sys.executable, "-m", "step35_trt"]
# A clean process that has torch, of which ranks are forked: importing it takes longer than all they do.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["step35_trt.runtime.programs.program_loading", "tests.rank_stories", "tests.device_ranks"]
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


def start(command: list[str], place: dict[str, str]) -> subprocess.Popen[str]:
    """A command as torchrun starts it, what it says to be read."""
    environment = {k: v for k, v in os.environ.items() if k != "WORLD_SIZE"} | place
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


def run_ranks(ranks: int, work: Callable[..., None], *arguments: object) -> list[int | None]:
    """Call `work` in each of `ranks` processes; their exit codes."""
    processes = [
        _SERVER.Process(target=_placed, args=(place, work, arguments), daemon=True) for place in places(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def _placed(place: dict[str, str], work: Callable[..., None], arguments: tuple[object, ...]) -> None:
    os.environ.update(place)
    work(*arguments)
