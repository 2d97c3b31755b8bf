"""Commands that several processes are started with: the first does the work, and the others follow it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from step35_trt.checkpoint import Checkpoint
from step35_trt.cli import cli
from step35_trt.errors import UsageError
from step35_trt.resources import NANO
from step35_trt.runtime.batch_files.batch import run_batch
from step35_trt.runtime.load import load_text
from step35_trt.runtime.session_torch import TorchSession
from tests.batches import line, read, write
from tests.rank_stories import BOTH
from tests.ranks import Started, places, shared_bundle

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano for two processes."""
    return shared_bundle(NANO, tmp_path_factory.mktemp("pair") / "bundle", 2, **BOTH)


def together(said: Path, *words: object) -> str:
    """What the first of two processes prints; the other prints nothing."""
    (code, out, err), other = (one.end(240) for one in [Started(words, place, said) for place in places(2)])
    assert (code, other) == (0, (0, "", "")), err
    return out


def answers(path: Path) -> list[object]:
    return [record["response"]["body"]["choices"][0]["text"] for record in read(path)]


def test_batch(pair: Path, tmp_path: Path) -> None:
    prompts = ("def read(self):", "import os", "class A:")
    fields = {"max_tokens": 6, "temperature": 0}
    lines = [line(str(n), body={"prompt": prompt} | fields) for n, prompt in enumerate(prompts)]
    requests = write(tmp_path / "in.jsonl", *lines)
    figures = json.loads(together(tmp_path, "batch", pair, requests, "-o", tmp_path / "out.jsonl", "--json"))
    assert (figures["answered"], figures["errors"]) == (3, 0)
    text = load_text(pair, required=True)
    assert text is not None
    run_batch(TorchSession.of(Checkpoint.open(NANO)), text, requests, tmp_path / "alone.jsonl")
    assert answers(tmp_path / "out.jsonl") == answers(tmp_path / "alone.jsonl")


def test_bench(pair: Path, tmp_path: Path) -> None:
    words = ["--input-tokens", 9, "--output-tokens", 6, "--concurrency", "1,3", "--requests", 3, "--json"]
    runs = json.loads(together(tmp_path, "bench", pair, *words))["runs"]
    assert [(run["requests"], run["output_tokens"]) for run in runs] == [(3, 18), (3, 18)]


def test_verify(pair: Path, tmp_path: Path) -> None:
    report = json.loads(
        together(tmp_path, "verify", pair, "--reference", "nano", "--ids", "7,8,9,10,11", "--json")
    )
    assert report["tokens"] == 5


@pytest.mark.parametrize("rank", [0, 1])
def test_what_starts_its_own_processes_is_started_once(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    for name, value in places(2)[rank].items():
        monkeypatch.setenv(name, value)
    requests = write(tmp_path / "in.jsonl", line("a"))
    words = ["batch", str(pair), str(requests), "-o", str(tmp_path / "out"), "--ray", "local"]
    result = CliRunner().invoke(cli, words)
    if rank:
        assert isinstance(result.exception, SystemExit)
        assert result.exit_code == UsageError.exit_code
        assert result.output == ""
    else:
        assert isinstance(result.exception, UsageError)
        assert (
            result.exception.message
            == "Ray starts the workers of a cluster itself, and 2 processes started it"
        )
    assert not (tmp_path / "out").exists()
