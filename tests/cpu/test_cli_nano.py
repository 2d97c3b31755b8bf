"""nano through the command line: text, batches that survive kill -9, the demo's bundle."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from step35_trt.build import build
from step35_trt.engine import EngineSpec
from step35_trt.resources import NANO

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.early

PROGRAM = [sys.executable, "-m", "step35_trt"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nano") / "bundle"
    build(NANO, out, EngineSpec.load("cpu-int4"))
    return out


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_text_is_streamed_and_counted(bundle: Path) -> None:
    done = run("generate", bundle, "--prompt", "The import statement", "--max-tokens", 40)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 20
    assert "tokens/s" in done.stderr
    assert "acceptance by head" in done.stderr
    result = json.loads(
        run("generate", bundle, "--prompt", "The import statement", "--max-tokens", 40, "--json").stdout
    )
    assert result["text"] + "\n" == done.stdout
    assert len(result["token_ids"]) == result["stats"]["generated_tokens"] <= 40
    assert sum(result["stats"]["accepted"]) > 0


def test_a_stop_string_ends_the_answer(bundle: Path) -> None:
    whole = json.loads(run("generate", bundle, "--prompt", "The", "--max-tokens", 40, "--json").stdout)
    stop = whole["text"][10:13]
    cut = json.loads(
        run("generate", bundle, "--prompt", "The", "--max-tokens", 40, "--json", "--stop", stop).stdout
    )
    assert cut["finish_reason"] == "stop"
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]


def requests(path: Path, count: int) -> Path:
    lines = []
    for i in range(count):
        body: dict[str, object] = {"prompt": f"def function_{i}(", "max_tokens": 24}
        if i % 3 == 1:
            body = {"messages": [{"role": "user", "content": f"What is {i}?"}], "max_tokens": 24}
        if i % 7 == 5:
            body["temperature"] = "hot"
        lines.append(json.dumps({"custom_id": f"r{i}", "method": "POST", "body": body}))
    lines[4] = "this is not JSON"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_batch_survives_kills(bundle: Path, tmp_path: Path) -> None:
    source = requests(tmp_path / "in.jsonl", 40)
    assert run("batch", bundle, source, "-o", tmp_path / "whole.jsonl").returncode == 0
    want = (tmp_path / "whole.jsonl").read_bytes()
    out, delays, kills = tmp_path / "out.jsonl", random.Random(0), 0
    # A few at a time, so that answers come in many portions.
    command = [*PROGRAM, "batch", str(bundle), str(source), "-o", str(out), "--sequences", "2"]
    partial = tmp_path / "out.jsonl.partial"
    while not out.exists() and kills < 4:
        before = partial.stat().st_size if partial.exists() else 0
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while child.poll() is None and (not partial.exists() or partial.stat().st_size <= before):
            time.sleep(0.002)
        time.sleep(delays.uniform(0, 0.02))
        if child.poll() is None:
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        child.wait()
    assert kills >= 3
    assert run("batch", bundle, source, "-o", out).returncode == 0
    assert out.read_bytes() == want
    answers = [json.loads(line) for line in want.splitlines()]
    assert len(answers) == 40
    assert answers[4]["response"]["status_code"] == 400
    failed = [i for i, answer in enumerate(answers) if answer["error"]]
    assert failed == sorted({4, *(i for i in range(40) if i % 7 == 5)})
    assert [a["custom_id"] for i, a in enumerate(answers) if i != 4] == [f"r{i}" for i in range(40) if i != 4]


def test_verify(bundle: Path) -> None:
    done = run("verify", bundle, "--reference", "nano")
    assert done.returncode == 0, done.stderr
    assert "decoder" in done.stdout
