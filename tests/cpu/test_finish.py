"""The last step of a sealed bundle, by a TensorRT that needs no GPU in the place of the target's."""

from __future__ import annotations

import fcntl
import importlib
import os
import shutil
import signal
import sys
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

from step35_trt import build_tensorrt, bundle, verify
from step35_trt import finish as finishing
from step35_trt.build import build
from step35_trt.build_tensorrt import compile_segment
from step35_trt.bundle import Bundle
from step35_trt.deployment import Deployment
from step35_trt.dialects.tensorrt_segment import Builder, Engine
from step35_trt.dialects.tensorrt_timing import TimingCache
from step35_trt.errors import CorruptInputError, DoesNotFitError, UnsupportedError, UsageError
from step35_trt.finish import finish
from step35_trt.journal import Journal
from step35_trt.progress import silent
from step35_trt.runtime import gpu
from step35_trt.runtime.load import open_bundle
from tests.bundles import edit_manifest
from tests.cpu.test_build import contents, in_child
from tests.cpu.test_build_tensorrt import command
from tests.cpu.test_sealed import ALONE, IDS, program_of, quantised
from tests.gpu_kernels import uncompiled
from tests.synthetic import raw_config, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from step35_trt.checkpoint import Checkpoint
    from step35_trt.dialects.tensorrt_functional import Functional
    from step35_trt.dialects.tensorrt_segment import Profile
    from step35_trt.progress import Progress

pytestmark = pytest.mark.filterwarnings("ignore:.*Timing cache:DeprecationWarning")


class Spark(Builder):
    """Builds for a GPU that TensorRT-RTX knows, whatever is asked for."""

    def build(
        self,
        written: Functional,
        ranges: tuple[Profile, ...],
        capability: str,
        progress: Progress = silent,
    ) -> Engine:
        assert capability == "9.0"
        return super().build(written, ranges, "12.1", progress)


class Quick(Spark):
    """Compiles nothing: for what is around the compiler."""

    def build(
        self,
        written: Functional,
        ranges: tuple[Profile, ...],
        capability: str,
        progress: Progress = silent,
    ) -> Engine:
        return Engine(b"engine" * written.network.num_layers, 0.0)


def quick(_: str) -> Builder:
    return Quick(importlib.import_module("tensorrt_rtx"))


def rtx(capability: str, timing: TimingCache | None = None) -> Builder:
    """In the place of `Builder.tensorrt`."""
    assert capability == "9.0"
    return Spark(importlib.import_module("tensorrt_rtx"), timing)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    raw = raw_config(layers=4, modules=1, hidden_size=128, moe_intermediate_size=128)
    root = tmp_path_factory.mktemp("source")
    return quantised(write_checkpoint(root / "plain", raw), root / "made", ALONE)


@pytest.fixture(scope="module")
def whole(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_tensorrt, "compile_kernels", uncompiled)
        build(source.directory, out, ALONE)
    return out


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with the GPU."""
    monkeypatch.setattr(gpu, "capabilities", lambda: ["9.0"])


@pytest.fixture
def sealed(whole: Path, tmp_path: Path) -> Path:
    """A copy to finish."""
    return shutil.copytree(whole, tmp_path / "bundle")


@pytest.fixture
def complete(sealed: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished one, on a machine whose TensorRT is the one that finished it."""
    here = bundle.versions("tensorrt")
    monkeypatch.setattr(bundle, "versions", lambda _: here | {"tensorrt": "11.4.0"})
    finish(sealed, builder_for=quick)
    return sealed


def test_finishing_compiles_what_is_missing(sealed: Path, whole: Path, source: Checkpoint) -> None:
    told: list[tuple[int, int, str]] = []
    before = contents(whole)
    assert finish(sealed, lambda *said: told.append(said), rtx)
    opened, program = Bundle.open(sealed), program_of(sealed)
    segments = set(program.segments.values())
    assert opened.manifest.unfinished == ()
    assert opened.manifest.versions["tensorrt"] == importlib.import_module("tensorrt_rtx").__version__
    assert opened.damaged() == []
    after = contents(sealed)
    assert after.keys() - before.keys() == segments
    assert all(len(after[name]) > 10_000 for name in segments)
    assert all(after[name] == before[name] for name in before if name != "manifest.json")
    # TensorRT's own steps are told, and each segment.
    assert {total for _, total, _ in told} == {len(segments)}
    assert any("Building engine" in name for _, _, name in told)
    assert [done for done, _, name in told if name in segments] == list(range(1, len(segments) + 1))
    report = verify.compare_program(sealed, source.directory, IDS)
    assert report is not None
    assert report.off == ""
    assert not finish(sealed, builder_for=rtx)
    assert contents(sealed) == after


def test_the_checkpoint_is_not_needed(source: Checkpoint, sealed: Path) -> None:
    away = source.directory.with_name("away")
    source.directory.rename(away)
    try:
        assert finish(sealed, builder_for=quick)
    finally:
        away.rename(source.directory)


def test_kills_leave_what_was_compiled(sealed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an engine, inside one, and around the manifest's replacement: the same command ends it."""
    compiled: list[str] = []

    def counting(deployment: object, key: str, *rest: object) -> bytes:
        compiled.append(key)
        return compile_segment(deployment, key, *rest)  # type: ignore[arg-type]

    record = Journal.finish
    total = len(program_of(sealed).segments)

    def dying(after: int) -> None:
        def finished(self: Journal, file: str) -> None:
            if len(self.records) == after:
                os.kill(os.getpid(), signal.SIGKILL)
            record(self, file)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Journal, "finish", finished)
            assert os.WIFSIGNALED(in_child(lambda: finish(sealed, builder_for=quick)))

    for after in (2, 5):
        dying(after)
        assert Bundle.open(sealed).manifest.unfinished
        assert len(list((sealed / "segments").glob("*.engine"))) == after + 1
    kept = {path.name: path.read_bytes() for path in (sealed / "segments").glob("*.engine")}
    monkeypatch.setattr(finishing, "compile_segment", counting)

    def die_before_the_manifest(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finishing, "replacing", die_before_the_manifest)
        assert os.WIFSIGNALED(in_child(lambda: finish(sealed, builder_for=quick)))
    assert Bundle.open(sealed).manifest.unfinished
    assert finish(sealed, builder_for=quick)
    assert compiled == []  # all of them were there
    assert Bundle.open(sealed).damaged() == []
    last = contents(sealed)
    # The sixth was written but not recorded: compiled again, and all before it were not.
    assert sum(last[f"segments/{name}"] == content for name, content in kept.items()) >= 5
    assert len([name for name in last if name.endswith(".engine")]) == total
    assert not any("journal" in name for name in last)


def test_killed_after_the_manifest(sealed: Path) -> None:
    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle, "sync", lambda path: die() if path == sealed else None)
        assert os.WIFSIGNALED(in_child(lambda: finish(sealed, builder_for=quick)))
    assert not Bundle.open(sealed).manifest.unfinished
    assert not finish(sealed, builder_for=quick)
    assert not (sealed / "segments" / "journal.jsonl").exists()


def test_another_tensorrt_starts_again(sealed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines of two versions do not come together in one bundle."""

    def ended(done: int, _total: int, name: str) -> None:
        if done == 3 and name.endswith(".engine"):
            raise OSError("the machine's power")

    with pytest.raises(UsageError):
        finish(sealed, ended, quick)
    first = {path.name: path.stat().st_mtime_ns for path in (sealed / "segments").glob("*.engine")}
    assert len(first) == 3
    monkeypatch.setattr(Builder, "version", "11.9")
    assert finish(sealed, builder_for=quick)
    assert all((sealed / "segments" / name).stat().st_mtime_ns != time for name, time in first.items())


def test_control_c_ends_a_segment_and_keeps_the_others(sealed: Path) -> None:
    def pressing(done: int, _total: int, name: str) -> None:
        if done == 2 and "Building engine" in name:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        finish(sealed, pressing, rtx)
    assert len(list((sealed / "segments").glob("*.engine"))) == 2
    assert Bundle.open(sealed).manifest.unfinished
    assert finish(sealed, builder_for=quick)


def test_what_progress_raises_ends_the_build(sealed: Path) -> None:
    def broken(*_: object) -> None:
        raise ValueError("a broken pipe, say")

    with pytest.raises(ValueError, match="a broken pipe"):
        finish(sealed, broken, rtx)


# What refuses to finish.


@pytest.mark.parametrize(
    ("here", "devices", "reason", "mends"),
    [
        ([], 1, "has no NVIDIA GPU", "verify"),
        (["12.1"], 1, "for compute capability 9.0, the GPU here has 12.1", "--engine dgx-spark-int4"),
        (["9.0"], 2, "is shared by 2 GPUs, and this machine has 1", "fewer devices"),
        (["8.9", "9.0"], 1, "not all of them have", "CUDA_VISIBLE_DEVICES=1"),
    ],
)
def test_another_machine(
    sealed: Path, monkeypatch: pytest.MonkeyPatch, here: list[str], devices: int, reason: str, mends: str
) -> None:
    monkeypatch.setattr(gpu, "capabilities", lambda: here)
    edit_manifest(sealed, lambda raw: raw["engine"].update(devices=devices))
    with pytest.raises(UnsupportedError, match=reason) as caught:
        finish(sealed, builder_for=quick)
    assert mends in caught.value.hint
    assert "\n" not in caught.value.message
    assert not (sealed / "segments").exists()


def test_no_tensorrt(sealed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UnsupportedError, match="TensorRT is not installed") as caught:
        finish(sealed)
    assert "pip install tensorrt" in caught.value.hint


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("10.13.3", r"TensorRT 10\.13\.3 is too old: 11 or newer"),
        ("11.4.0", "does not start here: no driver"),
    ],
)
def test_a_tensorrt_that_cannot(
    sealed: Path, monkeypatch: pytest.MonkeyPatch, version: str, reason: str
) -> None:
    class Stopped:
        def __init__(self, _: object) -> None:
            raise RuntimeError("no driver\nand more")

    module = ModuleType("tensorrt")
    rtx_module = importlib.import_module("tensorrt_rtx")
    module.__dict__.update(__version__=version, ILogger=rtx_module.ILogger, Builder=Stopped)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    with pytest.raises(UnsupportedError, match=reason):
        finish(sealed)


def test_a_segment_that_tensorrt_refuses(sealed: Path) -> None:
    class Refusing(Spark):
        def _add(self, config: object, network: object, profile: object) -> None:
            """Without profiles."""

    with pytest.raises(UnsupportedError, match=r"tensorrt_rtx cannot build the segment: .*profile"):
        finish(sealed, builder_for=lambda _: Refusing(importlib.import_module("tensorrt_rtx")))


def test_two_at_once(sealed: Path) -> None:
    (sealed / "segments").mkdir()
    handle = os.open(sealed / "segments", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(UsageError, match="is being finished by another run"):
            finish(sealed, builder_for=quick)
    finally:
        os.close(handle)


def test_no_room(sealed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: os.terminal_size((0, 0)))
    monkeypatch.setattr(os.terminal_size, "free", 10, raising=False)
    with pytest.raises(DoesNotFitError):
        finish(sealed, builder_for=quick)


def test_a_program_of_another_version(sealed: Path) -> None:
    edit_manifest(sealed, lambda raw: raw["recipe"]["rules"].insert(0, {"weights": "*", "precision": "bf16"}))
    with pytest.raises(CorruptInputError, match="is not what its model and recipe make"):
        finish(sealed, builder_for=quick)


# What refuses a finished bundle.


def test_the_machine_that_finished_it_would_run_it(complete: Path) -> None:
    with pytest.raises(UnsupportedError, match="fits this machine"):
        open_bundle(complete)


def test_another_tensorrt(complete: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = bundle.versions("tensorrt")
    monkeypatch.setattr(bundle, "versions", lambda _: here | {"tensorrt": "11.5.0"})
    with pytest.raises(UnsupportedError, match="fits this machine"):  # torch runs the segments then
        open_bundle(complete)
    manifest = Bundle.open(complete).manifest
    with pytest.raises(
        UnsupportedError, match=r"built for tensorrt 11\.4\.0, this machine has 11\.5"
    ) as caught:
        bundle.check_version(manifest, "tensorrt", "11.5.0")
    assert "pip install tensorrt==11.4.0" in caught.value.hint


def test_another_gpu(complete: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "capabilities", lambda: ["12.1"])
    with pytest.raises(
        UnsupportedError, match=r"for compute capability 9\.0, the GPU here has 12\.1"
    ) as caught:
        open_bundle(complete)
    assert "--engine dgx-spark-int4" in caught.value.hint


@pytest.mark.parametrize("kind", ["segments", "kernels"])
def test_spoiled_files(complete: Path, kind: str) -> None:
    path = next((complete / kind).iterdir())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptInputError, match="has changed since the bundle was built") as caught:
        open_bundle(complete)
    assert "--engine h200-int4" in caught.value.hint
    path.unlink()
    with pytest.raises(CorruptInputError, match="is missing from"):
        open_bundle(complete)


def test_a_kernel_that_the_manifest_forgot(complete: Path) -> None:
    name = program_of(complete).kernels[0].code
    edit_manifest(complete, lambda raw: raw["files"].pop(name))
    with pytest.raises(CorruptInputError, match="the program needs kernels/") as caught:
        open_bundle(complete)
    assert "build-engine CHECKPOINT" in caught.value.hint


# What is kept between builds.


def test_timings_are_kept(sealed: Path, tmp_path: Path) -> None:
    """TensorRT-RTX has the calls, though they do nothing there."""
    cache = TimingCache(tmp_path / "kept" / "x.timing")
    made = Deployment.of_bundle(Bundle.open(sealed))
    compile_segment(made, next(iter(made.programs.segments)), rtx("9.0", cache))
    first = cache.path.read_bytes()
    assert len(first) > 100
    config = rtx("9.0").builder.create_builder_config()
    cache.attach(config)
    assert bytes(config.get_timing_cache().serialize()) == first
    cache.path.write_bytes(b"not of this machine")
    cache.attach(config)
    assert bytes(config.get_timing_cache().serialize()) == first


# The command.


def test_the_command(
    sealed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(monkeypatch, "build-engine", "--finish", sealed, "-o", "x") == 2
    assert "nothing else" in capsys.readouterr().err
    assert command(monkeypatch, "build-engine", "nano", "--engine", "h200-int4") == 2
    assert "needs a checkpoint, --output and --engine" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert command(monkeypatch, "build-engine", "--finish", sealed) == 3
    assert "TensorRT is not installed" in capsys.readouterr().err
    assert command(monkeypatch, "generate", sealed, "--prompt-ids", "1") == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "is sealed" in said
    assert f"build-engine --finish {sealed}" in said
    finish(sealed, builder_for=quick)
    assert command(monkeypatch, "build-engine", "--finish", sealed) == 0
    assert "is finished already" in capsys.readouterr().err
