"""On two GPUs: ranks that exchange over NCCL, recorded and replayed, and how they end."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

torch = pytest.importorskip("torch")
if torch.cuda.device_count() < 2 or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs two CUDA devices and compiled kernels", allow_module_level=True)

from step35_trt.resources import NANO  # noqa: E402 - after the skip
from step35_trt.runtime.device.device_runner import DeviceRunner  # noqa: E402
from step35_trt.runtime.placement import Placement  # noqa: E402
from tests.device_ranks import session_of, sharing  # noqa: E402
from tests.rank_stories import BOTH, EXPERT, TENSOR, send_home, told  # noqa: E402
from tests.ranks import run_ranks  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path

    from step35_trt.runtime.session_program import ProgramSession
    from step35_trt.sharing import Way

PROMPT, TOKENS = list(range(100, 140)), 40


def opened(ways: dict[str, Way]) -> ProgramSession:
    """nano on this process's GPU."""
    device = torch.device("cuda", Placement.here().local)
    torch.cuda.set_device(device)
    return session_of(NANO, device, shared=sharing(2, ways))


def lead(ways: dict[str, Way], out: Path) -> None:
    """A rank's whole life; recordings are given up before NCCL's groups, which else wait for ever."""
    session = opened(ways)
    answers = [told(session, PROMPT, drafts, TOKENS) for drafts in (0, 3, 3)]
    (out / "answers.json").write_text(json.dumps(answers))
    send_home(session)


@pytest.mark.parametrize("ways", [TENSOR, EXPERT, BOTH], ids=["tensor", "expert", "both"])
def test_two_gpus_say_what_one_says(tmp_path: Path, ways: dict[str, Way]) -> None:
    """In fp32 but for the experts' products, where best tokens lie further apart than orders of additions."""
    assert run_ranks(2, lead, ways, tmp_path) == [0, 0]
    expected = told(session_of(NANO, torch.device("cuda", 0)), PROMPT, 0, TOKENS)
    assert json.loads((tmp_path / "answers.json").read_text()) == [expected] * 3


def die(out: Path) -> None:
    """The second rank is killed while the first waits for its GPU."""
    obey, heard = DeviceRunner.obey, 0

    def once_more(self: DeviceRunner, order: object) -> None:
        nonlocal heard
        heard += 1
        if heard == 20:
            (out / "killed").write_text(str(time.monotonic()))
            os.kill(os.getpid(), signal.SIGKILL)
        obey(self, order)  # type: ignore[arg-type]

    DeviceRunner.obey = once_more  # type: ignore[method-assign, assignment]
    told(opened(BOTH), PROMPT, 3, 300)


def test_a_killed_rank_ends_the_other(tmp_path: Path) -> None:
    codes = run_ranks(2, die, tmp_path)
    assert time.monotonic() - float((tmp_path / "killed").read_text()) < 10
    assert codes == [1, -signal.SIGKILL]
