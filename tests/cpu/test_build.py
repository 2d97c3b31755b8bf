"""Bundles: resumed after any interruption, refused when damaged, never half-written."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import traceback
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from step35_trt import build as builder
from step35_trt.build import build
from step35_trt.bundle import Bundle, staging
from step35_trt.checkpoint import Checkpoint
from step35_trt.dialects.onnx_standard import StandardSpelling
from step35_trt.engine import EngineSpec
from step35_trt.errors import CorruptInputError, DoesNotFitError, Step35Error, UnsupportedError, UsageError
from step35_trt.journal import Journal, staged
from step35_trt.quantize.recipe import Recipe
from step35_trt.runtime.load import open_bundle
from step35_trt.weight_file import WeightFile
from tests.bundles import edit_manifest
from tests.process_memory import printed
from tests.synthetic import raw_config, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.early

SPEC = EngineSpec.load("cpu-int4")


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a directory."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def source(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["small-window"]


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """An uninterrupted build."""
    out = tmp_path_factory.mktemp("whole") / "bundle"
    build(source, out, SPEC)
    return contents(out)


def in_child(work: Callable[[], object]) -> int:
    """Run in a forked process; returns its wait status."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(7)
    return os.waitpid(child, 0)[1]


def test_a_kill_at_every_journal_step_resumes(
    source: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = Journal.finish
    out = tmp_path / "bundle"
    done: list[str] = []

    def die_after_one(self: Journal, file: str) -> None:
        finish(self, file)
        os.kill(os.getpid(), signal.SIGKILL)

    def no_second_time(self: Journal, file: str) -> None:
        assert file not in done
        finish(self, file)

    deaths = 0
    while not out.exists():
        monkeypatch.setattr(Journal, "finish", die_after_one)
        status = in_child(lambda: build(source, out, SPEC))
        if os.WIFSIGNALED(status):
            deaths += 1
            journal = (staging(out) / "journal.jsonl").read_text().split("\n")
            done = [json.loads(line)["file"] for line in journal[1:] if line]
            assert len(done) == deaths  # each run adds one file and repeats none
        else:
            break
    monkeypatch.setattr(Journal, "finish", no_second_time)
    build(source, out, SPEC)
    assert deaths == len(whole) - 1  # all but the manifest
    assert contents(out) == whole
    assert not staging(out).exists()


def test_a_kill_in_the_middle_of_a_file(
    source: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = WeightFile.write
    out = tmp_path / "bundle"

    for stop in (1, 7, 60, 150):
        count = 0

        def dying(self: WeightFile, stream, stop: int = stop):  # type: ignore[no-untyped-def]
            nonlocal count
            for size in write(self, stream):
                count += 1
                if count == stop:
                    stream.flush()
                    os.kill(os.getpid(), signal.SIGKILL)
                yield size

        monkeypatch.setattr(WeightFile, "write", dying)
        in_child(lambda: build(source, out, SPEC))
        assert not out.exists()
    monkeypatch.setattr(WeightFile, "write", write)
    build(source, out, SPEC)
    assert contents(out) == whole


def test_a_torn_journal_line_costs_one_file(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    plan = builder._Plan.make(Checkpoint.open(source), builder.Recipe.load(SPEC.recipe), SPEC)
    sizes = {step.file: step.nbytes for step in plan.steps}
    with contextlib.suppress(KeyboardInterrupt), staged(out, plan.key, sizes) as (stage, journal):
        for step in plan.steps[:3]:
            list(step.write(stage / step.file))
            journal.finish(step.file)
        raise KeyboardInterrupt
    path = staging(out) / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    build(source, out, SPEC)
    assert contents(out) == whole


def test_another_build_in_the_same_place_starts_afresh(
    source: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bundle"
    monkeypatch.setattr(Journal, "finish", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    in_child(lambda: build(source, out, EngineSpec.load("cpu-fp32")))
    monkeypatch.undo()
    assert staging(out).exists()
    build(source, out, SPEC)
    assert contents(out) == whole


def test_a_killed_export_goes_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.load("fp32")

    def export(out: Path) -> object:
        return builder.export_onnx(source, out, StandardSpelling(), recipe)

    finish = Journal.finish
    monkeypatch.setattr(Journal, "finish", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert os.WIFSIGNALED(in_child(lambda: export(tmp_path / "killed")))
    monkeypatch.setattr(Journal, "finish", finish)
    export(tmp_path / "killed")
    export(tmp_path / "whole")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_building_twice(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    assert build(source, out, SPEC)
    assert not build(source, out, SPEC)
    with pytest.raises(UsageError, match="exists and is not this build's result"):
        build(source, out, EngineSpec.load("cpu-fp32"))
    assert Bundle.open(out).manifest.engine.name == "cpu-int4"


def test_two_builds_at_once(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    plan = builder._Plan.make(Checkpoint.open(source), builder.Recipe.load(SPEC.recipe), SPEC)
    with pytest.raises(UsageError, match="another build"), staged(out, plan.key, {}):
        build(source, out, SPEC)


def test_the_packed_files_are_safetensors(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    build(source, out, SPEC)
    names = set()
    for file in (out / "weights").iterdir():
        assert file.stat().st_size % 4096 == 0
        with safe_open(file, "numpy") as reader:
            names.update(reader.keys())
    assert "model.layers.3.moe.gate_up.int4" in names


def _edited(source: Path, tmp_path: Path, edit: Callable[[dict[str, np.ndarray]], None]) -> Path:
    copy = tmp_path / "checkpoint"
    shutil.copytree(source, copy)
    merged: dict[str, np.ndarray] = {}
    for shard in sorted(copy.glob("*.safetensors")):
        merged |= load_file(shard)
        shard.unlink()
    (copy / "model.safetensors.index.json").unlink()
    edit(merged)
    save_file(merged, copy / "model.safetensors")
    return copy


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("model.layers.4.moe.down_proj.weight", "model.layers.4.moe.down"),
        ("model.layers.4.moe.up_proj.weight", "model.layers.4.moe.gate_up"),
        ("model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"),
        ("model.norm.weight", "model.norm.weight"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("engine", ["cpu-int4", "cpu-fp32"])
def test_a_weight_that_is_not_finite(
    source: Path, tmp_path: Path, name: str, stored: str, value: float, engine: str
) -> None:
    def edit(weights: dict[str, np.ndarray]) -> None:
        weights[name].reshape(-1)[-1] = value

    out = tmp_path / "bundle"
    with pytest.raises(CorruptInputError, match="NaN or an infinity") as caught:
        build(_edited(source, tmp_path, edit), out, EngineSpec.load(engine))
    assert stored in caught.value.message
    assert not out.exists()


def test_modules_that_share_a_weight(source: Path, tmp_path: Path) -> None:
    def edit(weights: dict[str, np.ndarray]) -> None:
        tail = "transformer.shared_head.output.weight"
        weights[f"model.layers.11.{tail}"] = weights[f"model.layers.9.{tail}"].copy()

    with pytest.raises(CorruptInputError, match="MTP modules share a weight"):
        build(_edited(source, tmp_path, edit), tmp_path / "bundle", SPEC)


def test_a_width_without_blocks_stays_in_fp32(tmp_path: Path) -> None:
    """It runs all the same, and the manifest says so."""
    raw = raw_config(moe_intermediate_size=24, share_expert_dim=24, layers=5)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", raw)
    build(checkpoint, tmp_path / "bundle", SPEC)
    notes = Bundle.open(tmp_path / "bundle").manifest.notes
    assert any(note.startswith("model.layers.3.moe.up_proj.weight stays in fp32") for note in notes)
    assert any(note.startswith("model.layers.4.share_expert.down_proj.weight") for note in notes)
    assert not any("share_expert.up_proj" in note for note in notes)
    step = open_bundle(tmp_path / "bundle").open().decode(np.arange(9), np.arange(9))
    assert np.isfinite(step.logits).all()


def test_disk_full(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """A file size limit stands for a full disk; with room the same command goes on."""
    out = tmp_path / "bundle"

    def starved() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            build(source, out, SPEC)
        except DoesNotFitError as error:
            os._exit(0 if "no room left" in error.message else 1)

    assert in_child(starved) == 0
    assert not out.exists()
    build(source, out, SPEC)
    assert contents(out) == whole


def test_not_enough_room_is_said_before(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    with pytest.raises(DoesNotFitError, match=r"0\.0 MB free"):
        build(source, tmp_path / "bundle", SPEC)
    assert not list(tmp_path.iterdir())


def test_a_damaged_tokenizer_is_said_before(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "tokenizer.json").write_text("{")
    with pytest.raises(CorruptInputError, match="not a tokenizer"):
        build(tmp_path / "checkpoint", tmp_path / "bundle", SPEC)
    assert not staging(tmp_path / "bundle").exists()


@pytest.fixture(scope="module")
def whole_bundle(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be left as it was."""
    out = tmp_path_factory.mktemp("unspoilt") / "bundle"
    build(source, out, SPEC)
    return out


@pytest.fixture
def bundle(source: Path, tmp_path: Path) -> Path:
    out = tmp_path / "bundle"
    build(source, out, SPEC)
    return out


def _refused(bundle: Path, kind: type[Step35Error]) -> str:
    with pytest.raises(kind) as caught:
        Bundle.open(bundle)
    assert "\n" not in caught.value.message
    assert caught.value.hint
    return caught.value.message


def test_a_changed_graph(bundle: Path) -> None:
    path = bundle / "mtp-1.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "mtp-1.onnx has changed" in _refused(bundle, CorruptInputError)


def test_a_short_weight_file(bundle: Path) -> None:
    path = bundle / "weights" / "layer-05.safetensors"
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - 1)
    assert "layer-05" in _refused(bundle, CorruptInputError)


def test_a_flipped_weight_bit_is_found_by_the_full_check(bundle: Path) -> None:
    path = bundle / "weights" / "layer-05.safetensors"
    values = np.memmap(path, np.uint8, "r+")
    values[-5000] ^= 1
    values.flush()
    assert Bundle.open(bundle).damaged() == ["weights/layer-05.safetensors"]


@given(data=st.data())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_bit_is_found(whole_bundle: Path, data: st.DataObject) -> None:
    """Refused when the bundle is opened, or found by the full check; the manifest itself included."""
    path = data.draw(st.sampled_from(sorted(p for p in whole_bundle.rglob("*") if p.is_file())))
    name = str(path.relative_to(whole_bundle))
    at = data.draw(st.integers(0, path.stat().st_size - 1))
    _flip(path, at, bit := data.draw(st.integers(0, 7)))
    found = _found(whole_bundle)
    _flip(path, at, bit)
    assert name in found if name != "manifest.json" else found
    assert _found(whole_bundle) == ""


def _found(bundle: Path) -> str:
    """What opening a bundle or its full check says of it."""
    try:
        return ", ".join(Bundle.open(bundle).damaged())
    except Step35Error as error:
        return error.message


def _flip(path: Path, at: int, bit: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(at)
        value = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([value ^ 1 << bit]))


def test_a_file_of_another_build_is_refused_when_opened(bundle: Path) -> None:
    """Of the right size, with other weights in it."""
    ours, theirs = (bundle / "weights" / f"layer-{n:02}.safetensors" for n in (5, 6))
    assert ours.stat().st_size == theirs.stat().st_size
    shutil.copy(theirs, ours)
    assert "layer-05.safetensors has changed" in _refused(bundle, CorruptInputError)


def test_a_missing_file(bundle: Path) -> None:
    (bundle / "program.json").unlink()
    assert "program.json is missing" in _refused(bundle, CorruptInputError)


def test_another_runtime(bundle: Path) -> None:
    edit_manifest(bundle, lambda raw: raw["versions"].update(onnxruntime="9.9"))
    assert "onnxruntime 9.9" in _refused(bundle, UnsupportedError)


def test_a_newer_schema(bundle: Path) -> None:
    path = bundle / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    assert "schema 99" in _refused(bundle, UnsupportedError)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema_version": 2}', "[" * 100_000])
def test_hostile_manifests(bundle: Path, content: str) -> None:
    (bundle / "manifest.json").write_text(content)
    _refused(bundle, CorruptInputError)


def test_a_manifest_that_points_outside(bundle: Path) -> None:
    edit_manifest(bundle, lambda raw: raw["files"].update({"../../etc/passwd": {"size": 1}}))
    with pytest.raises(CorruptInputError, match="outside"):
        Bundle.open(bundle)


def test_an_unfinished_bundle_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "bundle.partial").mkdir()
    assert "interrupted" in _refused(tmp_path / "bundle", UsageError)


MEMORY_BUDGET = """
import sys
from pathlib import Path
from step35_trt.build import build
from step35_trt.engine import EngineSpec
from tests.process_memory import status

base = status("VmRSS")
for source in map(Path, sys.argv[3:]):
    build(source, Path(sys.argv[2]) / source.name, EngineSpec.load(sys.argv[1]))
    print(status("VmHWM") - base)
"""


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same model with five layers and with nine."""
    sizes = {"hidden_size": 512, "moe_num_experts": 16, "moe_intermediate_size": 512}
    root = tmp_path_factory.mktemp("growing")
    return [write_checkpoint(root / str(layers), raw_config(layers=layers, **sizes)) for layers in (5, 9)]


@pytest.mark.parametrize("engine", ["cpu-int4", "cpu-fp32"])
def test_memory_does_not_grow_with_layers(growing: list[Path], tmp_path: Path, engine: str) -> None:
    """The build streams: twice the layers, the same peak, and less than the checkpoint."""
    peaks = printed(MEMORY_BUDGET, engine, tmp_path, *growing)
    size = Checkpoint.open(growing[1]).nbytes
    assert size > 160e6
    assert max(peaks) < size
    assert peaks[1] < peaks[0] + 40e6  # four layers more are 100 MB more of checkpoint


def test_fp8_experts_are_packed_like_their_values(tmp_path: Path) -> None:
    """The official FP8 layout and a bf16 checkpoint of the same values give the same weights."""
    from tests.cpu.test_checkpoint import FP8, _save_with_fp8

    raw = raw_config()
    plain = write_checkpoint(tmp_path / "plain", raw, shards=1)
    file = next(plain.glob("*.safetensors"))
    tensors = load_file(file)
    experts = [n for n in tensors if ".moe." in n and n.endswith("_proj.weight")]
    coded, values = dict(tensors), dict(tensors)
    for name in experts:
        codes = tensors[name].astype(ml_dtypes.float8_e4m3fn)
        shape = (*codes.shape[:-2], codes.shape[-2] // 16, codes.shape[-1] // 16)
        coded |= {name: codes, f"{name}_scale_inv": np.full(shape, 0.5, np.float32)}
        values[name] = (codes.astype(np.float32) * 0.5).astype(ml_dtypes.bfloat16)
    save_file(values, file)
    official = tmp_path / "official"
    official.mkdir()
    (official / "config.json").write_text(json.dumps(raw | {"quantization_config": FP8}))
    _save_with_fp8(official / "model.safetensors", coded)
    (plain / "model.safetensors.index.json").unlink()
    build(plain, tmp_path / "a", SPEC)
    build(official, tmp_path / "b", SPEC)
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    weights = [name for name in a if name.startswith("weights/")]
    assert len(weights) > 10
    assert all(a[name] == b[name] for name in weights)
