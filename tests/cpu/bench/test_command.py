"""`bench` on nano, as a user calls it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from step35_trt.bench import load, workload
from step35_trt.cli import cli
from step35_trt.errors import DoesNotFitError, UsageError
from step35_trt.resources import NANO
from step35_trt.runtime.load import open_bundle
from tests.cpu.pages.structure import check_page
from tests.engines import engine

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "bundle"
    engine(NANO, out, "cpu-int4")
    return out


def test_random_load(bundle: Path, tmp_path: Path) -> None:
    page = tmp_path / "bench.html"
    words = ["bench", str(bundle), "--input-tokens", "9", "--output-tokens", "6", "--concurrency", "1,3"]
    result = CliRunner().invoke(cli, [*words, "--requests", "4", "--html", str(page), "--json"])
    assert result.exit_code == 0, result.output
    runs = json.loads(result.stdout)["runs"]
    assert [run["concurrency"] for run in runs] == [1, 3]
    for run in runs:
        assert run["requests"] == 4
        assert (run["input_tokens"], run["output_tokens"]) == (36, 24)
        assert 0 < run["first_token"]["p50"] <= run["whole"]["p50"]
        assert run["between"]["mean"] > 0
        assert 0 < run["of_roofline"] < 1
    check_page(page.read_text(encoding="utf-8"))


def test_dataset(bundle: Path, tmp_path: Path) -> None:
    lines = [{"custom_id": str(n), "body": {"prompt": [5, 6, 7 + n]}} for n in range(3)]
    lines.append({"custom_id": "text", "body": {"prompt": "def read(self):"}})
    dataset = tmp_path / "requests.jsonl"
    dataset.write_text("\n".join(map(json.dumps, lines)))
    words = ["bench", str(bundle), "--dataset", str(dataset), "--output-tokens", "3", "--concurrency", "2"]
    result = CliRunner().invoke(cli, [*words, "--json"])
    assert result.exit_code == 0, result.output
    (run,) = json.loads(result.stdout)["runs"]
    assert (run["requests"], run["output_tokens"]) == (4, 12)
    assert run["input_tokens"] > 9


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no request"),
        ('{"custom_id": "a", "body": {}}', "messages or a prompt"),
        ("[1]", "not a JSON object"),
    ],
)
def test_bad_dataset_is_a_sentence(bundle: Path, tmp_path: Path, content: str, message: str) -> None:
    dataset = tmp_path / "requests.jsonl"
    dataset.write_text(content)
    result = CliRunner().invoke(cli, ["bench", str(bundle), "--dataset", str(dataset)])
    assert isinstance(result.exception, UsageError)
    assert message in result.exception.message


@pytest.mark.parametrize("text", ["0", "a", "1,,2", "", "-1"])
def test_concurrency_is_numbers(bundle: Path, text: str) -> None:
    result = CliRunner().invoke(cli, ["bench", str(bundle), "--concurrency", text])
    assert isinstance(result.exception, UsageError)


def test_load_is_within_the_context(bundle: Path) -> None:
    session = open_bundle(bundle)
    with pytest.raises(UsageError, match="do not fit"):
        workload.synthetic(session, 1, session.max_tokens, 1, 0)


def test_a_failed_request_ends_the_run(bundle: Path) -> None:
    session = open_bundle(bundle)
    item = workload.Item((1,) * session.max_tokens, 1)
    with pytest.raises(DoesNotFitError):
        load.run(session, [item], 1, 0)


def test_never_more_in_flight_than_asked(bundle: Path) -> None:
    session = open_bundle(bundle)
    items = workload.synthetic(session, 7, 5, 8, 0)
    answers = load.run(session, items, 3, 0).answers
    times = [(a.sent, a.arrivals[-1][0]) for a in answers]
    most = max(sum(start <= at < end for start, end in times) for at, _ in times)
    assert most == 3
    assert all(sum(count for _, count in a.arrivals) == 8 for a in answers)
