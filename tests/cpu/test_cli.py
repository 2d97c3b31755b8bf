"""The contract of the command line: results on stdout, one sentence on stderr, exit codes."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from step35_trt import cli
from tests.cpu.dialects.test_torch import expected, relative
from tests.oracle import Oracle

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Call the program; returns exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["step35-trt", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        output = capsys.readouterr()
        assert "Traceback" not in output.err
        return code, output.out, output.err

    return call


@pytest.fixture(scope="module")
def bundle(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from step35_trt.build import build
    from step35_trt.engine import EngineSpec

    out = tmp_path_factory.mktemp("cli") / "bundle"
    build(checkpoints["small-window"], out, EngineSpec.load("cpu-fp32"))
    return out


def test_build_verify_inspect(run, checkpoints: dict[str, Path], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    source, out = checkpoints["small-window"], tmp_path / "bundle"
    code, _, err = run("build_engine", source, "-o", out, "--engine", "cpu-fp32")
    assert (code, "ready" in err) == (0, True)
    code, text, _ = run("verify", out, "--reference", source, "--json")
    report = json.loads(text)
    assert code == 0
    assert [d["name"] for d in report["differences"]] == ["decoder", "mtp-0", "mtp-1", "mtp-2"]
    assert max(d["relative_error"] for d in report["differences"]) < 1e-4
    code, text, _ = run("inspect", out, "--json", "--check")
    assert code == 0
    assert json.loads(text)["manifest"]["engine"]["name"] == "cpu-fp32"
    assert "layers 7, 8" in json.loads(text)["manifest"]["notes"][0]
    code, text, _ = run("inspect", out)
    assert (code, "decoder.onnx" in text) == (0, True)


def test_verify_fails_a_bundle_of_other_weights(run, bundle: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from tests.synthetic import raw_config, write_checkpoint

    other = write_checkpoint(tmp_path / "other", raw_config(), seed=9)
    code, _, err = run("verify", bundle, "--reference", other)
    assert code == 5
    assert "further from the checkpoint" in err
    third = write_checkpoint(tmp_path / "third", raw_config(moe_top_k=2))
    assert run("verify", bundle, "--reference", third)[0] == 3


@pytest.mark.parametrize("what", ["bundle", "checkpoint"])
def test_logits(run, bundle: Path, checkpoints: dict[str, Path], tmp_path: Path, what: str) -> None:  # type: ignore[no-untyped-def]
    source = checkpoints["small-window"]
    ids = np.random.default_rng(0).integers(0, 97, 30)
    out = tmp_path / "out.npz"
    model = bundle if what == "bundle" else source
    code, _, _ = run("logits", model, "--ids", ",".join(map(str, ids)), "-o", out)
    assert code == 0
    got, want = np.load(out), expected(source, ids)
    assert {name: value.dtype for name, value in got.items()} == dict.fromkeys(
        ("logits", "hidden", "mtp_logits"), np.float32
    )
    assert relative(got["logits"], want.logits) < 1e-4
    assert relative(got["hidden"], want.hidden) < 1e-4
    assert got["mtp_logits"].shape == (3, 30, 97)
    assert (np.isnan(got["mtp_logits"]) == np.isnan(want.mtp_logits)).all()


def test_logits_leave_nothing_half_written(bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "step35_trt", "logits", bundle, "--ids", ",".join(["1"] * 200)]
    command += ["-o", tmp_path / "out.npz"]

    def starved() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(command, check=False, capture_output=True, text=True, preexec_fn=starved)
    assert done.returncode == 4
    assert "no room left" in done.stderr
    assert not list(tmp_path.iterdir())


def test_generate_is_greedy_and_drafts(run, bundle: Path, checkpoints: dict[str, Path]) -> None:  # type: ignore[no-untyped-def]
    prompt = [3, 7, 11, 60, 2, 9]
    oracle, want = Oracle.load(checkpoints["small-window"]), list(prompt)
    for _ in range(24):
        want.append(int(oracle.decode(np.array(want))[0][-1].argmax()))
    answer = want[len(prompt) :]
    ends = [i for i, token in enumerate(answer) if token in (1, 2, 5)]
    reason = "stop" if ends else "length"
    answer = answer[: ends[0]] if ends else answer
    for drafts in ("0", "1", "3", "auto"):
        code, text, _ = run(
            *("generate", bundle, "--prompt-ids", ",".join(map(str, prompt)), "--max-tokens", 24),
            *("--draft-tokens", drafts, "--json"),
        )
        result = json.loads(text)
        assert code == 0
        assert result["token_ids"] == answer
        assert result["finish_reason"] == reason
        assert len(result["stats"]["acceptance"]) == 3
        assert (sum(result["stats"]["drafted"]) > 0) == (drafts != "0")


def test_export_onnx(run, checkpoints: dict[str, Path], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    source = checkpoints["small-window"]
    for ops in ("standard", "ort"):
        assert run("export-onnx", source, "-o", tmp_path / ops, "--ops", ops)[0] == 0
        assert (tmp_path / ops / "decoder.onnx").exists()
    assert run("export-onnx", source, "-o", tmp_path / "ort", "--ops", "ort")[0] == 2
    code, _, err = run("export-onnx", source, "-o", tmp_path / "x", "--recipe", "cpu-int4")
    assert code == 3
    assert "--ops ort" in err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["generate", "{bundle}"], 2, "--prompt"),
        (["generate", "{bundle}", "--prompt-ids", "1,x"], 2, "token ids"),
        (["generate", "{bundle}", "--prompt-ids", "1,999999"], 2, "vocabulary"),
        (["generate", "{bundle}", "--prompt-ids", "1", "--temperature", "nan"], 2, "temperature"),
        (["generate", "{bundle}", "--prompt-ids", "1", "--draft-tokens", "9"], 2, "9"),
        (["generate", "{bundle}", "--prompt-ids", "1", "--draft-tokens", "many"], 2, "many"),
        (["generate", "{bundle}", "--prompt-ids", "1", "--max-tokens", "0"], 2, "max-tokens"),
        (["generate", "{bundle}", "--prompt", "text"], 2, "no tokenizer"),
        (["generate", "{bundle}", "--prompt-ids", "1", "--stop", "x"], 2, "--stop takes text"),
        (["generate", "{tmp}/nothing", "--prompt-ids", "1"], 2, "not a finished bundle"),
        (["build-engine", "{tmp}/nothing", "-o", "{tmp}/x", "--engine", "cpu-fp32"], 2, "not a directory"),
        (["build-engine", "{tmp}", "-o", "{tmp}/x", "--engine", "cpu-fp32"], 6, "config.json"),
        (["build-engine", "{source}", "-o", "{tmp}/x", "--engine", "warp-drive"], 2, "cpu-int4"),
        (["build-engine", "{source}", "-o", "/proc/x/y", "--engine", "cpu-fp32"], 2, "cannot write"),
        (["logits", "{bundle}", "--ids", "-1", "-o", "{tmp}/o.npz"], 2, "vocabulary"),
        (["frobnicate"], 2, "frobnicate"),
        (["generate", ""], 2, "names no file or directory"),
        (["generate", "/", "--prompt", "x"], 2, "names no file or directory"),
        (["generate", "{bundle}", "--prompt-ids", "1_0"], 2, "token ids"),
        (["generate", "{bundle}", "--prompt-ids", "1", "--draft-tokens", "٣"], 2, "draft-tokens"),
        (["generate", "{bundle}", "--prompt-ids", "1", "--draft-tokens", "9" * 5000], 2, "draft-tokens"),
        (["generate", "{bundle}", "--chat", "--json"], 2, "--chat"),
        (["batch", "{bundle}", "in", "-o", "{tmp}/x", "--sequences", "9" * 20], 2, "--sequences"),
        (["batch", "{bundle}", "in", "-o", "{tmp}/x", "--price", "nan"], 2, "finite"),
        (["batch", "{bundle}", "in", "-o", "{tmp}/x", "--worker-cpus", "inf"], 2, "finite"),
        (["bench", "{bundle}", "--seed", "-1"], 2, "--seed"),
        (["bench", "{bundle}", "--concurrency", "999999999"], 2, "--concurrency"),
        (["bench", "{bundle}", "--concurrency", "²"], 2, "--concurrency"),
        (["serve", "{tmp}", "--http-port", "65536"], 2, "--http-port"),
        (["inspect", "{bundle}", "--html", "{tmp}"], 2, "directory"),
        (["logits", "", "--ids", "1", "-o", "{tmp}/x"], 2, "empty"),
        (["plan", "", "--engine", "cpu-int4"], 2, "empty"),
        (["quantize", "nano", "-o", "{tmp}/x", "--recipe", "fp8", "--evaluate", ""], 2, "cannot be read"),
        (
            ["quantize", "nano", "-o", "{tmp}/x", "--recipe", "fp8", "--max-host-memory", "9" * 400 + "T"],
            2,
            "number of bytes",
        ),
        (["generate", "{bundle}", "--prompt-ids", ",".join(["1"] * 5000)], 4, "4096"),
    ],
)
def test_mistakes_are_one_sentence(  # type: ignore[no-untyped-def]
    run,
    bundle: Path,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    arguments: list[str],
    code: int,
    says: str,
) -> None:
    places = {"bundle": bundle, "tmp": tmp_path, "source": checkpoints["small-window"]}
    got, out, err = run(*(argument.format(**places) for argument in arguments))
    assert got == code, err
    assert says in err.replace("\n", " ")
    assert err.startswith("error: ")
    assert "Usage" not in err
    assert not out
    assert not (tmp_path / "x").exists()


def test_the_bundle_of_the_current_directory(run, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(bundle)
    assert run("inspect", ".")[0] == 0
    assert run("logits", ".", "--ids", "1,2", "-o", "/dev/null")[0] == 0


def test_streams_that_are_closed_or_take_ascii_alone(bundle: Path) -> None:
    def started(*arguments: object, closed: int | None = None) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "20"}
        close = None if closed is None else lambda: os.close(closed)
        call = [sys.executable, "-m", "step35_trt", *map(str, arguments)]
        return subprocess.run(
            call, check=False, capture_output=True, text=True, env=environment, preexec_fn=close
        )

    assert started("generate", "--help").returncode == 0  # a narrow help has an ellipsis
    for closed in range(3):
        done = started("inspect", bundle, "--json", closed=closed)
        assert (done.returncode, done.stderr) == (0, "")
        assert bool(done.stdout) == (closed != 1)


def test_memory_and_disk_that_run_out(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    for error in (MemoryError(), OSError(errno.ENOSPC, "No space left on device")):

        def fail(error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr("step35_trt.doctor.examine", fail)
        code, _, err = run("doctor")
        assert (code, err.count("error: ")) == (4, 1)


def test_ctrl_c_while_building(tmp_path: Path) -> None:
    """SIGINT in the middle: exit code 130, one sentence; the same command finishes."""
    from tests.synthetic import raw_config, write_checkpoint

    source = write_checkpoint(tmp_path / "c", raw_config(hidden_size=512, moe_intermediate_size=512))
    command = [sys.executable, "-m", "step35_trt", "build-engine", source, "-o", tmp_path / "b"]
    command += ["--engine", "cpu-int4"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    stage = tmp_path / "b.partial" / "weights"
    while not (stage.is_dir() and len(list(stage.iterdir())) > 2):
        time.sleep(0.01)
        assert child.poll() is None
    os.kill(child.pid, signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert not (tmp_path / "b").exists()
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    assert (tmp_path / "b" / "manifest.json").exists()


def test_doctor(run) -> None:  # type: ignore[no-untyped-def]
    code, text, _ = run("doctor", "--json")
    assert code == 0
    assert {"memory", "onnxruntime", "NVIDIA driver"} <= {finding["what"] for finding in json.loads(text)}
