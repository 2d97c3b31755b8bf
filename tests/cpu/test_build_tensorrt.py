"""Bundles for a GPU, made, refused and checked on a machine without one."""

from __future__ import annotations

import json
import os
import shutil
import signal
from typing import TYPE_CHECKING

import numpy as np
import pytest

from step35_trt import build_tensorrt, cli, verify
from step35_trt.build import build, build_quantized
from step35_trt.bundle import Bundle, staging
from step35_trt.engine import EngineSpec
from step35_trt.errors import CorruptInputError, UnsupportedError
from step35_trt.gpu_forms import as_kernels_scale, deployed_forms
from step35_trt.gpu_weights import StoredWeights
from step35_trt.journal import Journal
from step35_trt.kernels.artefact import Facts, digest
from step35_trt.kernels.compile import compile_kernels
from step35_trt.program import SteppedProgram
from step35_trt.quantize.recipe import Recipe
from step35_trt.quantize.run import CalibrationOptions, Job
from step35_trt.runtime import gpu
from step35_trt.runtime.load import load_reference, open_bundle
from tests.bundles import edit_manifest, record_again
from tests.cpu.quantize.test_convert import run
from tests.cpu.test_build import contents, in_child
from tests.gpu_kernels import uncompiled
from tests.synthetic import raw_config, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from step35_trt.checkpoint import Checkpoint
    from step35_trt.kernels.artefact import CompiledKernel
    from step35_trt.kernels.targets import GpuTarget
    from step35_trt.kernels.variant import KernelVariant

pytestmark = pytest.mark.early

SPARK = EngineSpec.load("dgx-spark-int4")
# The engine's precisions, rounded to nearest: calibrating takes minutes.
ROUNDED = Recipe.load(SPARK.recipe).model_copy(update={"calibration": None})


def few_products(variants: Sequence[KernelVariant], target: GpuTarget) -> list[CompiledKernel]:
    """All in earnest, but for the products with matrices that are not square: their tiles are the same."""
    square = [v for v in variants if v.constants.get("N") == v.constants.get("K")]
    made = {kernel.variant.name: kernel for kernel in compile_kernels(square, target)}
    return [made.get(kernel.variant.name, kernel) for kernel in uncompiled(variants, target)]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_tensorrt, "compile_kernels", few_products)
        yield


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts as wide as the kernels' int4 wants them; square MLPs, whose weights can be turned."""
    raw = raw_config(
        layers=5,
        modules=1,
        hidden_size=128,
        heads=(8, 12),
        moe_intermediate_size=128,
        moe_num_experts=4,
        moe_top_k=2,
        intermediate_size=128,
        share_expert_dim=128,
    )
    return write_checkpoint(tmp_path_factory.mktemp("plain") / "checkpoint", raw)


@pytest.fixture(scope="module")
def source(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return run(plain, tmp_path_factory.mktemp("int4") / "checkpoint", ROUNDED)


@pytest.fixture(scope="module")
def whole(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "bundle"
    build(source.directory, out, SPARK)
    return out


@pytest.fixture
def bundle(whole: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(whole, tmp_path / "bundle")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what kernels do not matter to."""
    monkeypatch.setattr(build_tensorrt, "compile_kernels", uncompiled)


def program_of(directory: Path) -> SteppedProgram:
    program = Bundle.open(directory).program
    assert isinstance(program, SteppedProgram)
    return program


def test_the_bundle_is_complete(whole: Path, source: Checkpoint) -> None:
    opened, program = Bundle.open(whole), program_of(whole)
    assert opened.damaged() == []
    on_disk = {str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()}
    assert program.files | {"program.json", "manifest.json"} == on_disk
    steps = [step for part in program.programs for step in part.steps]
    engines = {step.engine for step in steps if step.kind == "segment"}
    assert engines == program.segments.keys()
    assert len(engines) < sum(step.kind == "segment" for step in steps)
    bound = {b.weight for step in steps if step.kind == "segment" for b in step.weights.values()}
    stored = {name.removesuffix(".scales") for name in program.weights}
    assert bound <= stored
    assert stored == source.codings.keys()
    assert all(place.offset % 4096 == 0 for place in program.weights.values())
    assert set(program.experts.values()) == {"int4"}
    formats = {(kernel.plugin, kernel.constants.get("FORMAT")) for kernel in program.kernels}
    assert {kind for plugin, kind in formats if plugin == "sparse_moe"} == {None, "int4"}
    assert {kind for plugin, kind in formats if plugin == "dense"} == {None, "int4", "fp8_channel"}
    assert opened.manifest.versions.keys() == {"step35-trt", "tensorrt-rtx", "triton"}
    assert any("has run on a GPU" in note for note in opened.manifest.notes)


def test_kernels_are_launched_as_their_metadata_says(whole: Path) -> None:
    for kernel in program_of(whole).kernels:
        code = (whole / kernel.code).read_bytes()
        facts = Facts.model_validate_json((whole / kernel.launch).read_bytes())
        if kernel.constants.get("N") == kernel.constants.get("K"):
            assert code[:4] == b"\x7fELF"
        assert facts.target == "sm_121"
        assert list(facts.digests.values()) == [digest(code)]


def test_weights_are_the_checkpoints(whole: Path, source: Checkpoint) -> None:
    """Values and scales of every form, experts included, and mapped, not copied."""
    program = program_of(whole)
    stored = StoredWeights(whole, program.weights, program.experts)
    forms, _ = deployed_forms(ROUNDED, source.config)
    wanted = as_kernels_scale(source)
    for name, shape in forms.shapes.items():
        for expert in range(shape[0]) if len(shape) == 3 else [None]:
            a, b = (read(name, forms(name), expert) for read in (stored.read, wanted))
            np.testing.assert_array_equal(a.values, b.values)
            assert (a.scales is None) == (b.scales is None)
            if a.scales is not None and b.scales is not None:
                np.testing.assert_array_equal(a.scales.astype(np.float32), b.scales.astype(np.float32))
    assert isinstance(stored.mapped("lm_head.weight"), np.memmap)


def test_kills_leave_what_was_finished(
    source: Checkpoint, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the kernels, between segments and in the weights; all but the engines is then the same."""
    out, finish, before = tmp_path / "bundle", Journal.finish, 0
    for stop in ("kernels/sparse_moe.combine.cubin", "segments/", "weights/layer-03"):

        def dying(self: Journal, file: str, stop: str = stop) -> None:
            finish(self, file)
            if file.startswith(stop):
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(Journal, "finish", dying)
        assert os.WIFSIGNALED(in_child(lambda: build(source.directory, out, SPARK)))
        lines = (staging(out) / "journal.jsonl").read_text().split("\n")
        files = [json.loads(line)["file"] for line in lines[1:] if line]
        assert len(files) == len(set(files)) > before
        before = len(files)
    monkeypatch.setattr(Journal, "finish", finish)
    kept = {name: (staging(out) / name).read_bytes() for name in files}
    build(source.directory, out, SPARK)
    mine, first = contents(out), contents(whole)
    assert {name: mine[name] for name in kept} == kept
    assert mine.keys() == first.keys()
    for name in mine:
        if not name.endswith(".engine") and name != "manifest.json":
            assert mine[name] == first[name], name


def test_a_checkpoint_in_another_precision(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"in int8 .* has it in bf16") as caught:
        build(plain, tmp_path / "bundle", SPARK)
    assert "--recipe int4-awq" in caught.value.hint
    job = Job.of(plain, ROUNDED, CalibrationOptions())
    assert build_quantized(job, tmp_path / "bundle", SPARK)
    assert Bundle.open(tmp_path / "bundle").manifest.quantized == ROUNDED
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


@pytest.mark.usefixtures("no_compiler")
def test_widths_that_kernels_do_not_take_in_int4(tmp_path: Path) -> None:
    """Experts of 96 features stay in bf16, and the manifest says so."""
    raw = raw_config(layers=4, modules=1, hidden_size=128, moe_intermediate_size=96)
    source = run(write_checkpoint(tmp_path / "plain", raw), tmp_path / "int4", ROUNDED)
    build(source.directory, tmp_path / "bundle", SPARK)
    assert set(program_of(tmp_path / "bundle").experts.values()) == {"bf16"}
    assert any("are in bf16" in note for note in Bundle.open(tmp_path / "bundle").manifest.notes)
    report = verify.compare_program(tmp_path / "bundle", source.directory, [3, 1, 4, 1, 5, 9, 2, 6])
    assert report is not None
    assert not report.off


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("recipe", ["bf16", "fp8", "fp8-official", "int4-experts-fp8"])
def test_other_recipes(plain: Path, tmp_path: Path, recipe: str) -> None:
    source = run(plain, tmp_path / "made", recipe)
    build(source.directory, tmp_path / "bundle", SPARK.model_copy(update={"recipe": recipe}))
    report = verify.compare_program(tmp_path / "bundle", source.directory, [3, 1, 4, 1, 5, 9, 2, 6])
    assert report is not None
    assert not report.off


def test_a_recipe_without_kernels(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="computes in fp32"):
        build(plain, tmp_path / "bundle", SPARK.model_copy(update={"recipe": "fp32"}))


# What refuses a bundle.


def _engine(directory: Path) -> Path:
    return directory / next(iter(program_of(directory).segments.values()))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda d: _engine(d).write_bytes(_engine(d).read_bytes()[:-1] + b"x"), "has changed"),
        (lambda d: (d / program_of(d).kernels[0].code).unlink(), "is missing"),
        (lambda d: os.truncate(d / "weights" / "layer-03.safetensors", 4096), "bytes instead of"),
    ],
    ids=["engine", "kernel", "weights"],
)
def test_a_spoiled_file_is_refused(bundle: Path, spoil: Callable[[Path], object], reason: str) -> None:
    spoil(bundle)
    with pytest.raises(CorruptInputError, match=reason) as caught:
        Bundle.open(bundle)
    assert "build-engine CHECKPOINT" in caught.value.hint
    assert "--engine dgx-spark-int4" in caught.value.hint


def test_a_kernel_that_the_manifest_forgot(bundle: Path) -> None:
    name = program_of(bundle).kernels[0].code
    edit_manifest(bundle, lambda raw: raw["files"].pop(name))
    with pytest.raises(CorruptInputError, match="the program needs kernels/"):
        Bundle.open(bundle)


def test_any_flipped_bit_is_found(bundle: Path) -> None:
    path = bundle / "weights" / "layer-03.safetensors"
    values = np.memmap(path, np.uint8, "r+")
    values[len(values) // 2] ^= 4
    values.flush()
    assert Bundle.open(bundle).damaged() == ["weights/layer-03.safetensors"]


@pytest.mark.parametrize(
    ("here", "reason", "mends"),
    [
        ([], "has no NVIDIA GPU", "verify"),
        (["9.0"], "for compute capability 12.1, the GPU here has 9.0", "--engine h"),
        (["12.1"], "cannot use its GPU", "torch for CUDA"),
    ],
)
def test_another_machine(
    whole: Path, monkeypatch: pytest.MonkeyPatch, here: list[str], reason: str, mends: str
) -> None:
    monkeypatch.setattr(gpu, "capabilities", lambda: here)
    with pytest.raises(UnsupportedError, match=reason) as caught:
        open_bundle(whole)
    assert mends in caught.value.hint
    assert "\n" not in caught.value.message


def test_another_tensorrt(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch runs the segments then: what refuses is that torch has no GPU here."""
    edit_manifest(bundle, lambda raw: raw["versions"].update({"tensorrt-rtx": "1.0.0"}))
    monkeypatch.setattr(gpu, "capabilities", lambda: ["12.1"])
    with pytest.raises(UnsupportedError, match="cannot use its GPU"):
        open_bundle(bundle)


# What verify finds.


def test_verify_passes(whole: Path, source: Checkpoint) -> None:
    report = verify.compare_program(whole, source.directory)
    assert report is not None
    assert report.off == ""
    assert report.tokens == verify.RANDOM_TOKENS
    assert {finding.graph for finding in report.comparison.findings} == {"decoder", "mtp-0"}


def test_another_reference_is_compared_as_a_whole(whole: Path, plain: Path) -> None:
    """The unquantised checkpoint: no step equals its, the distributions are near. Random weights are not
    what the recipe's limit is for, so only the order of size is looked at."""
    assert verify.compare_program(whole, plain) is None
    report = verify.compare(whole, load_reference(plain), list(range(20)))
    assert {d.name for d in report.differences} == {"decoder", "mtp-0"}
    assert 0 < max(d.mean_kl for d in report.differences) < 1


def turn(values: np.ndarray) -> np.ndarray:
    """A square weight of two codes a byte, transposed."""
    codes = np.stack([values & 15, values >> 4], -1).reshape(len(values), -1).T
    return codes[:, 0::2] | codes[:, 1::2] << 4


def change_sign(values: np.ndarray) -> np.ndarray:
    """Of the first weights, whose codes are four bits each."""
    changed = values.copy()
    changed.reshape(-1).view(np.uint8)[:64] ^= 0x88
    return changed


@pytest.mark.parametrize(
    ("name", "change", "path"),
    [
        ("model.layers.4.self_attn.g_proj.weight", np.negative, "model.layers.4.self_attn"),
        ("model.layers.1.mlp.up_proj.weight", turn, "model.layers.1"),
        ("model.layers.3.self_attn.q_proj.weight", change_sign, "model.layers.3.self_attn"),
        ("model.layers.2.input_layernorm.weight", np.negative, "model.layers.2.self_attn"),
        ("model.layers.3.moe.gate.weight", np.negative, "model.layers.3.moe"),
        ("model.layers.4.moe.down_proj.weight", np.flip, "model.layers.4.moe"),
        ("model.layers.4.moe.up_proj.weight.scales", np.flip, "model.layers.4.moe"),
        ("model.layers.5.self_attn.k_norm.weight", np.negative, "model.layers.5.self_attn"),
        ("lm_head.weight", np.flip, "model"),
    ],
)
def test_a_wrong_weight_is_named(
    bundle: Path, source: Checkpoint, name: str, change: Callable[[np.ndarray], np.ndarray], path: str
) -> None:
    """The manifest knows the changed file: only what the bundle computes gives it away."""
    place = program_of(bundle).weights[name]
    dtype = {"bfloat16": "V2", "float8_e4m3fn": "V1"}.get(place.dtype, place.dtype)
    values = np.memmap(bundle / place.file, dtype, "r+", place.offset, place.shape)
    if change is np.negative and place.dtype == "bfloat16":
        values.view(np.uint16)[...] ^= 0x8000
    else:
        values[...] = change(values).reshape(place.shape)
    values.flush()
    record_again(bundle, place.file)
    report = verify.compare_program(bundle, source.directory)
    assert report is not None
    found = report.comparison.first_off
    assert found is not None
    assert found.path == path
    assert path in report.off


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["step35-trt", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_the_commands(
    bundle: Path, source: Checkpoint, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ("verify", bundle, "--reference", source.directory, "--json")
    assert command(monkeypatch, *call) == 0
    assert json.loads(capsys.readouterr().out)["passed"]
    assert command(monkeypatch, "inspect", bundle, "--check") == 0
    shown = capsys.readouterr().out
    assert "decoder: token_ids, rows → S1 A1" in shown
    assert "projected" in shown
    assert command(monkeypatch, "inspect", bundle, "--json") == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert len(steps) == sum(len(part.steps) for part in program_of(bundle).programs)
    assert command(monkeypatch, "generate", bundle, "--prompt-ids", "1") == 3
    assert "no NVIDIA GPU" in capsys.readouterr().err
    place = program_of(bundle).weights["model.layers.2.self_attn.o_proj.weight"]
    np.memmap(bundle / place.file, np.uint8, "r+", place.offset, 4096)[...] ^= 0x77
    record_again(bundle, place.file)
    assert command(monkeypatch, *call) == 5
    printed = capsys.readouterr()
    assert not json.loads(printed.out)["passed"]
    assert "model.layers.2 of decoder is the first that is wrong" in " ".join(printed.err.split())
