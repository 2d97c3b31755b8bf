"""`step35-trt plan`: from a file, a directory or nano, with no back end; exit codes and sentences."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from step35_trt import cli
from step35_trt.resources import DATA
from tests.cpu.test_config import published
from tests.cpu.test_imports import HEAVY, PROBE

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(published()))
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["step35-trt", "plan", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        output = capsys.readouterr()
        assert "Traceback" not in output.err
        return code, output.out, output.err

    return call


def engine_file(tmp_path: Path, name: str, **changes: Any) -> Path:
    raw = yaml.safe_load((DATA / "engines" / f"{name}.yaml").read_text()) | changes
    path = tmp_path / "engine.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_json(run, config: Path) -> None:  # type: ignore[no-untyped-def]
    code, text, _ = run(config, "--engine", "dgx-spark-int4", "--json")
    plan = json.loads(text)
    assert (code, plan["fits"], plan["projection"]) == (0, True, True)
    assert plan["parameters"]["main"] == 196_956_130_368
    assert [round(f["main"] / 1e9, 1) for f in plan["published_formats"][:3]] == [393.9, 203.7, 111.5]
    whole = next(c for c in plan["kv_cache"]["contexts"] if c["context"] == 262144)
    assert round(whole["nbytes"] / 2**30, 2) == 12.06
    assert plan["memory"]["free"] == plan["memory"]["capacity"] - plan["memory"]["needed"]
    assert {step["drafts"] for step in plan["steps"]} == {0, 1, 2, 3}
    assert all(step["tokens_per_second"] > 0 for step in plan["steps"])
    assert [s for s in plan["splits"] if s["refusal"]]


def test_a_directory_and_a_file_are_the_same(run, config: Path) -> None:  # type: ignore[no-untyped-def]
    assert run(config, "--engine", "h200-int4", "--json") == run(
        config.parent, "--engine", "h200-int4", "--json"
    )


def test_tables(run, config: Path) -> None:  # type: ignore[no-untyped-def]
    code, text, _ = run(config, "--engine", "h200x2-fp8")
    assert code == 0
    for part in (
        "196,956,130,368",
        "12.064",
        "It fits",
        "K = 3",
        "393.9",
        "KV heads",
        "Nothing was measured",
    ):
        assert part in text


@pytest.mark.parametrize("engine", ["dgx-spark-int4", "h100x8-fp8"])
def test_what_a_build_takes(run, config: Path, tmp_path: Path, engine: str) -> None:  # type: ignore[no-untyped-def]
    """The disk is the weights that the plan weighs and little else; a sentence says it everywhere."""
    _, text, _ = run(config, "--engine", engine, "--json", "--html", tmp_path / "plan.html")
    plan = json.loads(text)
    build = plan["build"]
    stored = plan["weights"]["with_modules"]
    # What every device has of its own is stored once for each.
    assert stored < build["nbytes"] < 1.01 * stored
    made = [part for part in build["parts"] if not part["later"]]
    assert build["nbytes"] == sum(part["nbytes"] for part in build["parts"])
    assert build["seconds"] == pytest.approx(sum(part["seconds"] for part in made))
    assert [part["what"] for part in build["parts"] if part["later"]] == ["segments"] * (engine[0] == "h")
    sentence = f"{build['nbytes'] / 1e9:.1f} GB of disk and about {build['seconds'] / 60:.0f} min"
    assert sentence in (tmp_path / "plan.html").read_text()
    _, text, _ = run(config, "--engine", engine)
    assert sentence in text
    assert "Disk and time of a build, projected" in text
    assert ("on the target" in text) == (engine[0] == "h")


def test_what_is_not_built_says_why(run, config: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    engine = engine_file(tmp_path, "dgx-spark-int4", recipe="fp32", max_sequences=1)
    _, text, _ = run(config, "--engine", engine, "--json")
    assert "fp32" in json.loads(text)["build"]["refused"]
    _, text, _ = run(config, "--engine", engine)
    assert "This version does not build it" in text
    assert json.loads(run("nano", "--engine", "cpu-int4", "--json")[1])["build"] is None


def test_nano(run) -> None:  # type: ignore[no-untyped-def]
    code, text, _ = run("nano", "--engine", "cpu-fp32", "--json")
    assert code == 0
    assert json.loads(text)["limits"]["context"] < 8192


def test_what_does_not_fit_is_exit_4(run, config: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    engine = engine_file(tmp_path, "dgx-spark-int4", max_tokens=262144, max_sequences=4)
    code, text, err = run(config, "--engine", engine, "--json", "--html", tmp_path / "plan.html")
    assert code == 4
    assert json.loads(text)["alternatives"]
    said = err.replace("\n", " ")
    assert "does not fit" in said
    assert "max_tokens" in said
    assert "does not fit" in (tmp_path / "plan.html").read_text()


def test_what_cannot_be_shared_is_exit_3(run, config: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    ways = {"attention": "tensor", "experts": "tensor"}
    engine = engine_file(tmp_path, "h100x8-fp8", recipe="fp8-official", parallelism=ways)
    code, text, err = run(config, "--engine", engine)
    assert (code, text) == (3, "")
    assert "1280 / 8 = 160" in err.replace("\n", " ")


@pytest.mark.parametrize("rates", ["", "x", "0.5,2", "-1", "nan"])
def test_acceptance_is_checked(run, config: Path, rates: str) -> None:  # type: ignore[no-untyped-def]
    code, _, err = run(config, "--engine", "h200-int4", f"--acceptance={rates}")
    assert code == 2
    assert "0.85,0.75,0.65" in err.replace("\n", " ")


def test_acceptance_changes_the_speed(run, config: Path) -> None:  # type: ignore[no-untyped-def]
    _, text, _ = run(config, "--engine", "h200-int4", "--json", "--acceptance", "1,1,1")
    step = next(s for s in json.loads(text)["steps"] if s["drafts"] == 3)
    assert step["tokens"] == 4


@pytest.mark.parametrize(("content", "code"), [("{", 6), ('{"model_type": "llama"}', 3)])
def test_hostile_configs(run, tmp_path: Path, content: str, code: int) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "config.json").write_text(content)
    assert run(tmp_path / "config.json", "--engine", "h200-int4")[0] == code


def test_unknown_engine_and_missing_model(run, config: Path) -> None:  # type: ignore[no-untyped-def]
    code, _, err = run(config, "--engine", "h300")
    assert (code, "h200-int4" in err) == (2, True)
    assert run(config.parent / "absent", "--engine", "h200-int4")[0] == 2


def test_no_back_end_is_imported(config: Path) -> None:
    arguments = ["step35-trt", "plan", str(config), "--engine", "h200-int4"]
    action = f"from step35_trt import cli; sys.argv = {arguments!r}; cli.main()"
    code = PROBE.format(action=action, heavy=HEAVY)
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=plain
    )
    assert done.returncode == 0, done.stderr
