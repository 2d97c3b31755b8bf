from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from step35_trt.build import build
from step35_trt.engine import EngineSpec
from step35_trt.errors import Step35Error, UsageError
from step35_trt.resources import NANO
from step35_trt.runtime.batch_files import batch_ray
from step35_trt.runtime.batch_files.batch import run_batch
from step35_trt.runtime.batch_files.batch_lines import Line
from step35_trt.runtime.batch_files.batch_ray import RayOptions, run_batch_ray
from step35_trt.runtime.batch_files.seen import SeenIds
from step35_trt.runtime.load import load_text, open_bundle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from step35_trt.runtime.batch_files.batch import BatchSummary

ray = pytest.importorskip("ray")
pytestmark = [
    pytest.mark.early,
    pytest.mark.skipif(sys.platform != "linux", reason="looks for workers in /proc"),
]
PAIR = RayOptions("local", workers=2, draft_tokens=0)
ONE = RayOptions("local", workers=1, draft_tokens=0)
REQUESTS = 5_000


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nano") / "bundle"
    build(NANO, out, EngineSpec.load("cpu-int4"))
    return out


@pytest.fixture(scope="module", autouse=True)
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Workers on other machines import an installed package; these find the checkout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[4]), *sys.path[1:]]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init("local", num_cpus=2, log_to_driver=False, include_dashboard=False)
        yield
        ray.shutdown()


def write(path: Path, count: int, tokens: int = 1) -> Path:
    with path.open("w") as out:
        for i in range(count):
            body = {"prompt": [5 + i % 900, 7], "max_tokens": tokens}
            out.write(json.dumps({"custom_id": f"request-{i}", "body": body}) + "\n")
    return path


def ids(path: Path) -> list[Any]:
    return [json.loads(line)["custom_id"] for line in path.read_text().splitlines()]


def workers() -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(b"ray::Worker"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def test_a_killed_worker_costs_no_answer_and_doubles_none(bundle: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in", REQUESTS)
    killed: list[int] = []

    def kill_in_the_middle(summary: BatchSummary) -> None:
        if summary.lines >= REQUESTS // 3 and not killed:
            killed.extend(workers()[:1])
            os.kill(killed[0], signal.SIGKILL)

    summary = run_batch_ray(bundle, source, tmp_path / "out", PAIR, progress=kill_in_the_middle)
    assert killed
    assert (summary.lines, summary.answered, summary.errors) == (REQUESTS, REQUESTS, 0)
    assert ids(tmp_path / "out") == [f"request-{i}" for i in range(REQUESTS)]
    # One machine's answers are the same, and it accepts the file as its own.
    text = load_text(bundle, required=True)
    assert text is not None
    short = write(tmp_path / "short", 40)
    run_batch(open_bundle(bundle), text, short, tmp_path / "alone", draft_tokens=0)
    lines = (tmp_path / "out").read_text().splitlines()[:40]
    assert (tmp_path / "alone").read_text().splitlines() == lines


def test_either_goes_on_where_the_other_has_stopped(bundle: Path, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", 300), tmp_path / "out"

    def stop(summary: BatchSummary) -> None:
        if summary.lines == 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_batch_ray(bundle, source, out, ONE, progress=stop)
    assert not out.exists()
    text = load_text(bundle, required=True)
    assert text is not None
    summary = run_batch(open_bundle(bundle), text, source, out, draft_tokens=0)
    assert summary.resumed == 100
    assert ids(out) == [f"request-{i}" for i in range(300)]


def test_a_line_that_is_off_is_its_own_fault(bundle: Path, tmp_path: Path) -> None:
    good = {"body": {"prompt": [5, 7], "max_tokens": 1}}
    lines = [{"custom_id": "a", **good}, {"custom_id": "a", **good}, {"custom_id": "b", "body": {}}]
    (tmp_path / "in").write_text("\n".join(map(json.dumps, lines)) + "\nno json\n")
    summary = run_batch_ray(bundle, tmp_path / "in", tmp_path / "out", ONE)
    assert (summary.answered, summary.errors) == (1, 3)
    errors = [json.loads(line)["error"] for line in (tmp_path / "out").read_text().splitlines()]
    assert errors[0] is None
    assert "custom_id" in errors[1]["message"]


def test_what_cannot_work_is_said_at_once(bundle: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in", 3)
    with pytest.raises(Step35Error, match="cannot load"):
        run_batch_ray(tmp_path / "nothing", source, tmp_path / "out", ONE)
    with pytest.raises(UsageError, match="worker"):
        run_batch_ray(bundle, source, tmp_path / "out", RayOptions("local", workers=0))


def test_lines_wait_on_disk_and_not_in_memory(bundle: Path, tmp_path: Path) -> None:
    """As much is read ahead as the window holds, however slow the workers are."""
    taken = 0

    def lines() -> Iterator[Line]:
        nonlocal taken
        body = json.dumps({"custom_id": "x", "body": {"prompt": [5], "max_tokens": 1}}).encode()
        for number in range(100_000):
            taken += 1
            yield Line(number + 1, body)

    with batch_ray.spread(bundle, ONE) as answering:
        answers = answering(lines())
        next(answers)
        time.sleep(1)
        assert taken <= batch_ray.PORTION_LINES * batch_ray.WINDOW * ONE.workers


def test_seen_ids_are_exact_and_small() -> None:
    seen, count = SeenIds(), 200_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert all(seen.add(f"{i}-{'x' * 40}") for i in range(count))
    assert not any(seen.add(f"{i}-{'x' * 40}") for i in range(0, count, 997))
    assert seen.add("another")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 40 << 20
