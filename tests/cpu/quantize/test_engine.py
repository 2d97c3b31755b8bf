"""Engines of quantised checkpoints: codes that fit are taken as they are, the rest is rounded again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import rich_click as click
from safetensors.numpy import load_file

from step35_trt import build as builder
from step35_trt import cli
from step35_trt.build import build, build_quantized
from step35_trt.bundle import Bundle
from step35_trt.commands import making
from step35_trt.engine import EngineSpec
from step35_trt.errors import UnsupportedError
from step35_trt.quantize import cpu_layout
from step35_trt.quantize.recipe import Recipe
from step35_trt.quantize.run import CalibrationOptions, Job
from step35_trt.resources import NANO
from step35_trt.runtime.load import load_reference, open_bundle
from step35_trt.verify import compare
from step35_trt.weight_store import WeightStore
from tests.codes import dequantize_blocks, untile
from tests.cpu.quantize.test_convert import only, run
from tests.cpu.test_build import contents

if TYPE_CHECKING:
    from pathlib import Path

    from step35_trt.checkpoint import Checkpoint

CPU = EngineSpec.load("cpu-int4")
EXACT = EngineSpec.load("cpu-fp32")
LINEAR = "model.layers.1.self_attn.q_proj.weight"
MOE = "model.layers.4.moe"


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return run(NANO, tmp_path_factory.mktemp("int4") / "checkpoint", "cpu-int4")


def stored(checkpoint: Checkpoint, layout: str, tmp_path: Path) -> dict[str, np.ndarray]:
    """Every packed weight of a linear and a layer's experts, as a bundle has them."""
    store = WeightStore(checkpoint, Recipe.load("cpu-int4"), layout)  # type: ignore[arg-type]
    store.matrix(LINEAR)
    store.experts(MOE, stretch=1.0 if layout == "tiles" else 2.0)
    found: dict[str, np.ndarray] = {}
    for file in store.files.values():
        path = tmp_path / file.name.replace("/", "-")
        with path.open("wb") as stream:
            for _ in file.write(stream):
                pass
        found |= load_file(path)
    return found


def test_tiles_hold_the_checkpoints_own_values(int4: Checkpoint, tmp_path: Path) -> None:
    """Exactly: scales are fp16 in both. The experts' groups of 128 are two blocks of 64 in the engine."""
    found = stored(int4, "tiles", tmp_path)
    n, _ = int4.shape(LINEAR)
    codes, scales = untile(found[f"{LINEAR}.int4"], found[f"{LINEAR}.scales"], n)
    np.testing.assert_array_equal(dequantize_blocks(codes, scales, 4), int4.read(LINEAR))
    gate, up = (int4.read(f"{MOE}.{part}_proj.weight") for part in ("gate", "up"))
    codes, scales = untile(found[f"{MOE}.gate_up.int4"], found[f"{MOE}.gate_up.scales"], 2 * gate.shape[1])
    np.testing.assert_array_equal(
        dequantize_blocks(codes, scales, 4), cpu_layout.interleave_gate_up(gate, up)
    )
    assert int4.codings[f"{MOE}.gate_proj.weight"].block == 128
    assert scales.shape[-1] == 2
    down = int4.read(f"{MOE}.down_proj.weight")
    codes, scales = untile(found[f"{MOE}.down.int4"], found[f"{MOE}.down.scales"], down.shape[1])
    np.testing.assert_array_equal(dequantize_blocks(codes, scales, 4), down)


def test_blocks_hold_the_checkpoints_own_values(int4: Checkpoint, tmp_path: Path) -> None:
    """With the up rows doubled and the down rows halved, as ONNX Runtime's clamp may need it."""
    found = stored(int4, "blocks", tmp_path)
    packed, scales = found[f"{MOE}.gate_up.int4"], found[f"{MOE}.gate_up.scales"]
    values = dequantize_blocks(packed, scales, 4)
    np.testing.assert_array_equal(values[:, 0::2], int4.read(f"{MOE}.gate_proj.weight"))
    np.testing.assert_array_equal(values[:, 1::2], 2 * int4.read(f"{MOE}.up_proj.weight"))
    values = dequantize_blocks(found[f"{MOE}.down.int4"], found[f"{MOE}.down.scales"], 4)
    np.testing.assert_array_equal(values, int4.read(f"{MOE}.down_proj.weight") / 2)


def test_codes_of_other_groups_are_made_again(tmp_path: Path) -> None:
    """Blocks larger than the checkpoint's groups cannot share a scale."""
    small = run(NANO, tmp_path / "small", only("int4", 32))
    assert small.codes(LINEAR, slice(0, 4), 4, 128) is None
    assert small.codes(LINEAR, slice(0, 4), 8, 32) is None
    found = stored(small, "tiles", tmp_path)
    n, _ = small.shape(LINEAR)
    codes, scales = untile(found[f"{LINEAR}.int4"], found[f"{LINEAR}.scales"], n)
    error = np.abs(dequantize_blocks(codes, scales, 4) - small.read(LINEAR)).max()
    assert 0 < error < np.abs(small.read(LINEAR)).max() / 7


def test_an_int4_engine_of_an_int4_checkpoint(int4: Checkpoint, tmp_path: Path) -> None:
    """Nothing is rounded twice: the same engine as from the unquantised weights, where rules agree."""
    build(int4.directory, tmp_path / "twice", CPU)
    direct = open_bundle(tmp_path / "twice")
    assert direct.config.same_model(load_reference(NANO).config)
    report = compare(tmp_path / "twice", load_reference(int4.directory))
    assert report.passed
    names = [f"weights/layer-{i:02}.safetensors" for i in (0, 1, 9)]  # no experts: groups as in the engine
    build(NANO, tmp_path / "once", CPU)
    for name in names:
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()


@pytest.mark.parametrize("recipe", ["fp8", "int4-experts-fp8", "fp8-official"])
def test_the_exact_engine_of_a_quantised_checkpoint(tmp_path: Path, recipe: str) -> None:
    """It computes with what the codes say: the torch oracle on the same checkpoint agrees to fp32."""
    made = run(NANO, tmp_path / "made", recipe)
    build(made.directory, tmp_path / "bundle", EXACT)
    report = compare(tmp_path / "bundle", load_reference(made.directory))
    assert report.max_mean_kl == 1e-6
    assert report.passed


def test_quantised_on_the_way(tmp_path: Path) -> None:
    job = Job.of(NANO, Recipe.load("fp8"), CalibrationOptions())
    out = tmp_path / "bundle"
    assert build_quantized(job, out, EXACT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle"]  # nothing between is left
    manifest = Bundle.open(out).manifest
    assert manifest.quantized is not None
    assert manifest.quantized.name == "fp8"
    assert not build_quantized(job, out, EXACT)
    report = compare(out, load_reference(NANO))
    assert report.passed
    assert report.max_mean_kl == Recipe.load("fp8").max_mean_kl
    assert min(d.mean_kl for d in report.differences) > 1e-6  # it is quantised


def test_an_interrupted_build_on_the_way_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job.of(NANO, Recipe.load("fp8"), CalibrationOptions())
    build_quantized(job, tmp_path / "whole", EXACT)
    write = builder._write

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(builder, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        build_quantized(job, tmp_path / "bundle", EXACT)
    assert (tmp_path / "bundle.quantized").is_dir()
    monkeypatch.setattr(builder, "_write", write)
    monkeypatch.setattr(
        "step35_trt.quantize.run.convert", lambda *a, **k: pytest.fail("it is converted already")
    )
    build_quantized(job, tmp_path / "bundle", EXACT)
    assert contents(tmp_path / "bundle") == contents(tmp_path / "whole")


def test_a_cpu_engine_has_no_fp8(tmp_path: Path) -> None:
    spec = CPU.model_copy(update={"recipe": "fp8"})
    with pytest.raises(UnsupportedError, match="which no CPU operator takes"):
        build(NANO, tmp_path / "bundle", spec)


def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    monkeypatch.setattr("sys.argv", ["step35-trt", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    return f"{code} {capsys.readouterr().err}"


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ("quantize", "nano", "-o", tmp_path / "out", "--recipe", "fp8")
    assert "is ready" in command(capsys, monkeypatch, *call)
    assert "there already" in command(capsys, monkeypatch, *call)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "modelopt"
    again = command(capsys, monkeypatch, *call[:-1], "bf16")
    assert again.startswith("2 ")
    assert "not this conversion's result" in again
    options = command(capsys, monkeypatch, *call, "--min_expert_tokens", "3")
    assert options.startswith("2 ")
    assert "recipe fp8 is not calibrated" in options
    built = command(
        capsys, monkeypatch, "build-engine", "nano", "-o", tmp_path / "b", "--engine", "cpu-int4",
        "--recipe", "fp8",
    )  # fmt: skip
    assert "is ready" in built


@pytest.mark.parametrize(
    ("text", "size"), [("12GiB", 12 << 30), ("500M", 500_000_000), ("1.5k", 1500), ("7", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert making.Bytes().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "-1", "GiB", "3 apples", "0"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter, match="number of bytes"):
        making.Bytes().convert(text, None, None)


def test_smaller_blocks_share_their_groups_scale(tmp_path: Path) -> None:
    """Two groups a row, two blocks a group: each block has the scale of its own group."""
    made = run(NANO, tmp_path / "made", only("int4", 64))
    own = made.codes(LINEAR, slice(2, 8), 4, 32)
    assert own is not None
    np.testing.assert_array_equal(dequantize_blocks(*own, 4), made.read(LINEAR, slice(2, 8)))
