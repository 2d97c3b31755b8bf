"""What ranks on devices do from their beginning to their end, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from step35_trt.bundle import Bundle
from step35_trt.errors import DoesNotFitError
from step35_trt.runtime.session import Call
from step35_trt.runtime.session_cuda import open_cuda
from tests.device_ranks import session_of, sharing
from tests.rank_stories import BOTH, see, send_home, tell, told
from tests.tape import Tape, TapeRecorder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from step35_trt.sharing import Way

CPU = torch.device("cpu")
TOKENS = 6
PROMPT = np.random.default_rng(0).integers(6, 96, 19).tolist()


def lead(path: Path, ranks: int, ways: dict[str, Way], out: Path) -> None:
    """A rank's whole life; each writes down what it recorded and replayed."""
    record = TapeRecorder()
    try:
        tell(session_of(path, CPU, record, sharing(ranks, ways)), PROMPT, TOKENS, out)
    finally:
        counts = record.recorded, record.replayed
        (out / f"recorded-{os.environ['RANK']}.json").write_text(json.dumps(counts))


def see_bundle(directory: Path, ids: list[int], out: Path) -> None:
    """A rank of a bundle for GPUs."""
    see(open_cuda(Bundle.open(directory), CPU), ids, out)


def refuse(path: Path, ways: dict[str, Way], out: Path) -> None:
    """A step that does not fit is refused by the first alone, and the next one runs."""
    session = session_of(path, CPU, TapeRecorder(), sharing(2, ways))
    two = [Call(session.open(), np.zeros(40, np.int64), np.array([0])) for _ in range(2)]
    with pytest.raises(DoesNotFitError, match="80 tokens, where 48"):
        session.decode(two)
    del two
    (out / "answer.json").write_text(json.dumps(told(session, [7, 8, 9], 3, TOKENS)))
    send_home(session)


def die(path: Path, ranks: int, victim: int, out: Path) -> None:
    """In the middle of a step that is replayed, one is killed; what all say goes to `out`."""
    rank = int(os.environ["RANK"])
    os.dup2(os.open(out / f"said-{rank}", os.O_CREAT | os.O_WRONLY), 2)

    def last(tape: Tape) -> None:
        middle = len(tape.operations) // 2
        del tape.operations[middle:]
        tape.replay()
        (out / "killed").write_text(str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)

    class Dying(TapeRecorder):
        def __call__(self, work: Callable[[], object]) -> Callable[[], None]:
            replay = super().__call__(work)
            return lambda: last(self.tapes[-1]) if rank == victim and self.replayed == 5 else replay()

    told(session_of(path, CPU, Dying(), sharing(ranks, BOTH)), [7, 8, 9], 3, 300)
