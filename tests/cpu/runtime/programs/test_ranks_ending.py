"""How processes that share a model end: all together, with one sentence, whoever starts them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from step35_trt.errors import RankLostError, UsageError
from step35_trt.resources import NANO
from step35_trt.runtime.load import open_bundle
from step35_trt.runtime.programs import ranks
from tests.rank_stories import BOTH
from tests.ranks import Started, places, shared_bundle

pytestmark = pytest.mark.early

LONG = ["--prompt-ids", "7,8,9", "--max-tokens", "100000", "--json"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano for two processes."""
    return shared_bundle(NANO, tmp_path_factory.mktemp("pair") / "bundle", 2, **BOTH)


def in_the_middle(*processes: int | None) -> bool:
    """Whether processes have read what lies at the end of every step: the head."""
    return all("lm_head.rank" in Path(f"/proc/{p}/maps").read_text() for p in processes)


def wait_for(condition: object, seconds: float) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_other(pair: Path, tmp_path: Path, victim: int) -> None:
    started = [Started(["generate", pair, *LONG], place, tmp_path) for place in places(2)]
    wait_for(lambda: in_the_middle(*(one.process.pid for one in started)), 120)
    started[victim].process.kill()
    killed = time.monotonic()
    code, out, err = started[1 - victim].end(30)
    assert time.monotonic() - killed < 10
    assert (code, out) == (1, "")
    assert err.splitlines()[0] == f"error: rank {victim} of 2 has ended, and the others end with it"
    assert len(err.splitlines()) == 2  # the sentence and its hint


def test_torchrun(pair: Path) -> None:
    """Two processes answer once and leave nothing; killed in the middle, one of them ends all."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    # It looks after its processes this often, and ends all where one is gone: they are to notice before.
    torchrun += ["--monitor-interval", "3", "-m", "step35_trt", "generate", str(pair), *LONG]
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    pipe = subprocess.PIPE
    started = subprocess.Popen(torchrun, env=environment, stdout=pipe, stderr=pipe, text=True)
    agent = started.pid

    def workers() -> list[int]:
        return [int(pid) for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]

    def woken() -> str:
        status = Path(f"/proc/{agent}/task/{agent}/status").read_text()
        return status[status.index("voluntary_ctxt_switches") :]

    try:
        wait_for(lambda: len(workers()) == 2 and in_the_middle(*workers()), 180)
        before = woken()
        wait_for(lambda: woken() != before, 20)  # it has looked, and rests
        os.kill(workers()[1], signal.SIGKILL)
        killed = time.monotonic()
        out, err = started.communicate(timeout=60)
    finally:
        started.kill()
    assert time.monotonic() - killed < 20  # torchrun's own report included
    assert out == ""
    assert err.count("error: ") == 1
    assert "error: rank 1 of 2 has ended, and the others end with it" in err


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({}, "{} is for 2 processes, and 1 process started it"),
        (places(4)[0], "{} is for 2 processes, and 4 processes started it"),
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE is 2 in the environment, with RANK, MASTER_ADDR, MASTER_PORT missing",
        ),
        (places(2)[0] | {"RANK": "2"}, "WORLD_SIZE is 2 in the environment, with RANK is 2"),
    ],
)
def test_another_number_of_processes(
    pair: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], sentence: str
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError) as caught:
        open_bundle(pair)
    assert caught.value.message == sentence.format(pair)
    assert "torchrun --nproc-per-node" in caught.value.hint


def test_only_the_first_process_complains(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in places(4)[3].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        open_bundle(pair)
    assert caught.value.code == UsageError.exit_code


def test_the_first_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it listens; the library would wait as long again."""
    place = places(2)[1]
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "JOIN", timedelta(seconds=1))
    met = pytest.fail.Exception("both are there")

    def meet(*_: object, **__: object) -> None:
        raise met

    monkeypatch.setattr(dist, "init_process_group", meet)
    with pytest.raises(RankLostError) as caught:
        ranks.Ranks.join(torch.device("cpu"))
    assert caught.value.message == "rank 1 waited 1 s for all 2 ranks to come"
    server = socket.create_server(("127.0.0.1", int(place["MASTER_PORT"])))
    with server, pytest.raises(pytest.fail.Exception, match="both are there"):
        ranks.Ranks.join(torch.device("cpu"))


def test_one_process_needs_no_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = shared_bundle(NANO, tmp_path / "bundle", 1)
    for name, value in places(2)[0].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=r"is for 1 process, and 2 processes started it") as caught:
        open_bundle(bundle)
    assert caught.value.hint.startswith("step35-trt generate")
