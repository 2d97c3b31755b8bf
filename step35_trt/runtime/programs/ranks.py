"""The processes that run one model together: rank 0 leads, the others do what it tells them.

Everything goes through `torch.distributed`. What a step exchanges goes over NCCL between GPUs and over gloo
between CPUs; orders and the watch over each other always go over gloo, which needs no device and notices at
once when a process ends. Whoever sees another end ends as well: alone it can do nothing.
"""

from __future__ import annotations

import atexit
import os
import socket
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from step35_trt import console
from step35_trt.errors import RankLostError
from step35_trt.runtime.placement import Placement

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from step35_trt.runtime.session import Ids
    from step35_trt.steps import CollectiveStep

JOIN = timedelta(seconds=60)  # for the last process to come
KNOCK = 1.0  # seconds for a try to reach the first
STALLED = timedelta(minutes=5)  # a step's slowest exchange: the first step reads the weights from the disk
FOREVER = timedelta(days=365)  # an order may be long in coming
ORDER = 256  # numbers of an order that go in one piece: all of a decoding step
SPEAK = 0.05  # seconds after which the watch ends a process that has not noticed by itself
INTERRUPTED = 130  # what a shell reports for a program that SIGINT ended
NAMED = 5.0  # seconds for the watch to say which rank an error is about


@dataclass
class Ranks:
    """This process among the others.

    Attributes:
        rank: From 0.
        size: How many there are.
        steps: The group that steps exchange through.
        orders: The group over which rank 0 tells what to run.
        watch: The group over which nothing goes but the end.
    """

    rank: int
    size: int
    steps: Any
    orders: Any
    watch: Any
    _lost: int | None = None
    _noticed: threading.Event = field(default_factory=threading.Event)
    _ending: threading.Lock = field(default_factory=threading.Lock)  # held by the thread that ends us
    _error: RankLostError | None = None
    _watchers: list[threading.Thread] = field(default_factory=list)
    _idle: bool = True  # the others wait for an order
    _parted: bool = False
    _code: int = RankLostError.exit_code
    _before: list[Callable[[], object]] = field(default_factory=list)

    @classmethod
    def join(cls, device: torch.device) -> Ranks:
        """Meet the others; returns when all are there.

        Args:
            device: Where this one computes; the current one, if it is a GPU.

        Raises:
            UsageError: the environment does not say who this process is.
            RankLostError: not all came.
        """
        place = Placement.here()
        rank, size = place.rank, place.size
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            if rank:
                _knock()
            dist.init_process_group("gloo", timeout=JOIN, rank=rank, world_size=size)
            steps = dist.new_group(backend=backend, timeout=STALLED)
            orders, watch = (dist.new_group(backend="gloo", timeout=FOREVER) for _ in range(2))
        except (RuntimeError, OSError) as error:
            raise RankLostError(
                f"rank {rank} waited {JOIN.seconds} s for all {size} ranks to come",
                f"What ended the waiting: {str(error).splitlines()[0]}",
            ) from None
        try:
            # NCCL connects in its first exchange, which may not be one that is being recorded.
            dist.all_reduce(torch.zeros(1, device=device), group=steps)
        except RuntimeError as error:
            raise RankLostError(
                f"rank {rank} cannot exchange anything with the others over {backend}",
                f"torch.distributed says: {str(error).splitlines()[0]}",
            ) from None
        ranks = cls(rank, size, steps, orders, watch)
        for peer in ranks._peers:
            thread = threading.Thread(target=ranks._watch, args=(peer,), name=f"watch-{peer}", daemon=True)
            ranks._watchers.append(thread)
            thread.start()
        atexit.register(ranks.leave)
        return ranks

    @property
    def speaks(self) -> bool:
        """Whether this process is the one that says which rank was lost: the first of those left."""
        return self.rank == min(r for r in range(self.size) if r != self._lost)

    def exchange(self, step: CollectiveStep, given: Tensor, output: Tensor) -> None:
        """Do a collective: see `runtime.program_torch.Exchange`."""
        if not given.numel():
            return
        if step.operation == "all_reduce":
            output.copy_(given)
            self._do(lambda: dist.all_reduce(output, group=self.steps))
            return
        # One token's parts lie side by side as they come.
        parts = output if len(given) == 1 else torch.empty_like(output)
        self._do(lambda: dist.all_gather_single(parts.view(-1), given.view(-1), group=self.steps))
        if parts is not output:
            by_rank = parts.view(self.size, len(given), -1)
            output.view(len(given), self.size, -1).copy_(by_rank.transpose(0, 1))

    def share(self, value: Tensor) -> None:
        """Rank 0's value for all."""
        self._do(lambda: dist.broadcast(value, 0, group=self.steps))

    def tell(self, order: Ids) -> None:
        """Tell all what to do next."""
        self._order(np.concatenate([[len(order)], order]))

    @contextmanager
    def working(self) -> Iterator[None]:
        """While a step runs: an error in it leaves the others inside, who cannot be told then."""
        self._idle = False
        try:
            yield
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            self._code = INTERRUPTED if interrupted else getattr(error, "exit_code", self._code)
            raise
        self._idle = True

    def hear(self) -> Ids | None:
        """The next order; None when there will be none."""
        first = self._order(np.zeros(ORDER, np.int64))
        length = int(first[0])
        return first[1 : 1 + length] if length else None

    def leave(self) -> None:
        """At the end of the process: rank 0 sends all home; who cannot part from the others ends at once.

        Threads still wait for peers then, and Python's own end would tear them out of the library's hands.
        """
        try:
            if self.rank == 0 and self._idle and not self._parted:
                self.tell(np.empty(0, np.int64))
                self.part()
        except RankLostError as error:
            console.fail(error.message, error.hint)
        if not self._parted:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self._code)

    def before_parting(self, release: Callable[[], object]) -> None:
        """Have something called before groups are given up: NCCL waits for the end of every recording."""
        self._before.append(release)

    def part(self) -> None:
        """Leave together, so that nobody takes it for a loss."""
        for release in self._before:
            release()
        for peer in self._peers:
            self._do(partial(dist.send, torch.ones(1), peer, group=self.watch))
        for thread in self._watchers:
            thread.join()
        dist.destroy_process_group()
        self._parted = True

    @property
    def _peers(self) -> list[int]:
        return [r for r in range(self.size) if r != self.rank]

    def _order(self, numbers: Ids) -> Ids:
        """Broadcast: a first piece of fixed length, and the rest where there is more."""
        first = np.zeros(ORDER, np.int64)
        first[: len(numbers)] = numbers[:ORDER]
        self._do(lambda: dist.broadcast(torch.from_numpy(first), 0, group=self.orders))
        more = int(first[0]) + 1 - ORDER
        if more <= 0:
            return first
        rest = numbers[ORDER:].copy() if self.rank == 0 else np.empty(more, np.int64)
        self._do(lambda: dist.broadcast(torch.from_numpy(rest), 0, group=self.orders))
        return np.concatenate([first, rest])

    def _do(self, exchange: Callable[[], object]) -> None:
        """Talk to the others.

        Raises:
            RankLostError: it failed; raised in one thread only, and the watch leaves the end to that.
        """
        if self._error is not None:
            raise self._error
        try:
            exchange()
        except RuntimeError as error:
            if not self._noticed.wait(NAMED) and "imed out" not in str(error):
                raise  # not the others' doing
            if not self._ending.acquire(blocking=False):
                threading.Event().wait()  # the watch is ending this process
            self._idle = False
            self._error = self._loss()
            raise self._error from None

    def _watch(self, peer: int) -> None:
        try:
            dist.recv(torch.zeros(1), peer, group=self.watch)
        except RuntimeError:
            if self._lost is None:
                self._lost = peer
            self._noticed.set()
            threading.Event().wait(SPEAK)
            if self._ending.acquire(blocking=False):
                if self.speaks:
                    error = self._loss()
                    console.fail(error.message, error.hint)
                os._exit(RankLostError.exit_code)

    def _loss(self) -> RankLostError:
        if self._lost is None:
            return RankLostError(f"rank {self.rank} waited {STALLED.seconds} s for the other {self.size - 1}")
        return RankLostError(
            f"rank {self._lost} of {self.size} has ended, and the others end with it",
            "Its own message, where it had one, says why; start all of them again.",
        )


def _knock() -> None:
    """Wait until the first process, or torchrun, listens: the library itself takes twice its time for that.

    Raises:
        OSError: it does not.
    """
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    end = time.monotonic() + JOIN.seconds
    while True:
        try:
            return socket.create_connection(address, KNOCK).close()
        except OSError:
            if time.monotonic() > end:
                raise
        time.sleep(KNOCK / 10)
