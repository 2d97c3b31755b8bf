from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from step35_trt.build import build
from step35_trt.engine import EngineSpec
from step35_trt.errors import DoesNotFitError, UnsupportedError, UsageError
from step35_trt.resources import NANO
from step35_trt.triton_repo import launch
from step35_trt.triton_repo.launch import Ports, Server, command, find_server
from step35_trt.triton_repo.tensors import (
    INPUTS,
    ONLY,
    OUTPUTS,
    TOKEN_OPTIONAL,
    TOKEN_OUTPUTS,
    TOKEN_REQUIRED,
)
from step35_trt.triton_repo.write import write_repository


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("na no") / 'bun"dle'
    build(NANO, out, EngineSpec.load("cpu-int4"))
    return out


def test_a_repository_points_to_its_bundle(bundle: Path, tmp_path: Path) -> None:
    assert write_repository(bundle, tmp_path / "repository")
    files = {str(p.relative_to(tmp_path / "repository")) for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {"README.md", "step35/config.pbtxt", "step35/1/model.py", "step35_tokens/config.pbtxt"}
    assert (tmp_path / "repository" / "step35_tokens" / "1").is_dir()
    assert sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()) < 50_000
    assert json.dumps(str(bundle)) in (tmp_path / "repository/step35/config.pbtxt").read_text()


def test_a_repository_is_never_overwritten(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "repository"
    assert write_repository(bundle, out)
    assert not write_repository(bundle, out)
    (out / "step35" / "config.pbtxt").write_text("mine")
    with pytest.raises(UsageError, match="something else"):
        write_repository(bundle, out)
    with pytest.raises(UsageError, match="sequence"):
        write_repository(bundle, tmp_path / "other", sequences=0)
    assert not (tmp_path / "other").exists()


def test_an_empty_directory_is_filled_and_a_failure_leaves_nothing(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "repository"
    out.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(DoesNotFitError, match="no room left"):
            write_repository(bundle, out)
    assert list(tmp_path.iterdir()) == [out]
    assert write_repository(bundle, out)


def test_triton_reads_the_configuration(bundle: Path, tmp_path: Path) -> None:
    """With the protocol's own message, where its package is installed."""
    text_format = pytest.importorskip("google.protobuf.text_format")
    messages = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    write_repository(bundle, tmp_path / "repository", sequences=5)

    def read(model: str) -> Any:
        text = (tmp_path / "repository" / model / "config.pbtxt").read_text()
        return text_format.Parse(text, messages.ModelConfig())

    engine, tokens = read("step35"), read("step35_tokens")
    assert engine.name == "step35"
    assert engine.model_transaction_policy.decoupled
    assert engine.parameters["bundle"].string_value == str(bundle)
    assert engine.parameters["sequences"].string_value == "5"
    assert engine.dynamic_batching.default_queue_policy.allow_timeout_override
    assert [t.name for t in engine.input] == [t.name for t in INPUTS]
    assert all(t.optional for t in engine.input)
    # Requests that are handed over together may have inputs of different lengths, else they would not be.
    assert engine.max_batch_size > 1
    assert {t.name for t in engine.input if t.allow_ragged_batch} == {t.name for t in INPUTS if -1 in t.dims}
    assert [t.name for t in engine.output] == [t.name for t in OUTPUTS]
    assert {t.name for t in tokens.input if not t.optional} == set(TOKEN_REQUIRED)
    kinds = {t.name: (t.data_type, list(t.dims)) for t in (*engine.input, *engine.output)}
    assert all(kinds[t.name] == (t.data_type, list(t.dims)) for t in (*tokens.input, *tokens.output))
    (step,) = tokens.ensemble_scheduling.step
    assert step.model_name == "step35"
    assert dict(step.input_map) == {name: name for name in (*TOKEN_REQUIRED, *TOKEN_OPTIONAL)}
    assert dict(step.output_map) == {name: name for name in TOKEN_OUTPUTS}


def test_the_readme_names_every_tensor_and_listens_here_only(bundle: Path, tmp_path: Path) -> None:
    write_repository(bundle, tmp_path / "repository")
    readme = (tmp_path / "repository" / "README.md").read_text()
    assert all(f"`{tensor.name}` " in readme for tensor in (*INPUTS, *OUTPUTS))
    assert "0.0.0.0" not in readme
    assert set(ONLY) < {tensor.name for tensor in INPUTS}


def test_a_server_is_started_on_this_machine_only(bundle: Path, tmp_path: Path) -> None:
    write_repository(bundle, tmp_path / "repository")
    server = Server(Path("/opt/tritonserver"), Path("/backends"), (Path("/libraries"),))
    line, environment = command(server, tmp_path / "repository", Ports(1, 2, 3), "127.0.0.1", ("--id", "x"))
    for kind, port in (("http", "1"), ("grpc", "2"), ("metrics", "3")):
        assert line[line.index(f"--{kind}-address") + 1] == "127.0.0.1"
        assert line[line.index(f"--{kind}-port") + 1] == port
    assert line[-2:] == ["--id", "x"]
    assert environment["LD_LIBRARY_PATH"].startswith("/libraries")
    assert environment["PATH"].startswith(str(Path(sys.executable).parent))
    with pytest.raises(UsageError, match="no model repository"):
        command(server, tmp_path, Ports(), "127.0.0.1")


def test_where_there_is_no_server_the_way_to_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise launch.PackageNotFoundError(name)

    monkeypatch.setattr(launch.shutil, "which", lambda _: None)
    monkeypatch.setattr(launch, "version", missing)
    with pytest.raises(UnsupportedError) as caught:
        find_server()
    assert "nvidia-pytriton" in caught.value.hint
    monkeypatch.setattr(launch.shutil, "which", lambda _: "/opt/tritonserver/bin/tritonserver")
    assert find_server() == Server(Path("/opt/tritonserver/bin/tritonserver"))
