"""Bundles for GPUs that TensorRT compiles for only where they are: made, shared and checked without them."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from step35_trt import build_tensorrt, bundle, verify
from step35_trt.build import build
from step35_trt.build_estimate import estimate_build
from step35_trt.bundle import Bundle, staging
from step35_trt.deployment import Deployment
from step35_trt.engine import EngineSpec, Parallelism
from step35_trt.errors import CorruptInputError, DoesNotFitError, UnsupportedError, UsageError
from step35_trt.gpu_forms import as_kernels_scale
from step35_trt.gpu_weights import StoredWeights
from step35_trt.kernels.artefact import Facts
from step35_trt.kernels.compile import compile_kernels
from step35_trt.program import SteppedProgram
from step35_trt.quantize.formats import Coding
from step35_trt.quantize.recipe import Recipe
from step35_trt.runtime import gpu
from step35_trt.runtime.load import load_reference, open_bundle
from step35_trt.sharing import Sharing
from step35_trt.weight_forms import Forms
from tests.bundles import record_again
from tests.cpu.quantize.test_convert import run
from tests.cpu.test_build import contents
from tests.gpu_kernels import uncompiled
from tests.synthetic import raw_config, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from step35_trt.checkpoint import Checkpoint
    from step35_trt.kernels.artefact import CompiledKernel
    from step35_trt.kernels.targets import GpuTarget
    from step35_trt.kernels.variant import KernelVariant

ALONE, PAIR = EngineSpec.load("h200-int4"), EngineSpec.load("h200x2-fp8")
IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def few_compiled(variants: Sequence[KernelVariant], target: GpuTarget) -> list[CompiledKernel]:
    """One of them in earnest."""
    found = uncompiled(variants, target)
    for i, variant in enumerate(variants):
        if variant.name == "combine":
            [found[i]] = compile_kernels([variant], target)
    return found


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_tensorrt, "compile_kernels", few_compiled)
        yield


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = raw_config(
        layers=5,
        modules=1,
        hidden_size=128,
        heads=(16, 24),
        groups=2,
        vocab_size=96,
        moe_num_experts=8,
        moe_top_k=2,
        moe_intermediate_size=256,
        share_expert_dim=128,
        intermediate_size=128,
    )
    return write_checkpoint(tmp_path_factory.mktemp("plain") / "checkpoint", raw)


def quantised(plain: Path, out: Path, spec: EngineSpec) -> Checkpoint:
    """In the engine's precisions, rounded to nearest: calibrating takes minutes."""
    return run(plain, out, Recipe.load(spec.recipe).model_copy(update={"calibration": None}))


@pytest.fixture(scope="module")
def source(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return quantised(plain, tmp_path_factory.mktemp("fp8") / "checkpoint", PAIR)


@pytest.fixture(scope="module")
def whole(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "bundle"
    build(source.directory, out, PAIR)
    return out


@pytest.fixture
def sealed(whole: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(whole, tmp_path / "bundle")


def program_of(directory: Path) -> SteppedProgram:
    program = Bundle.open(directory).program
    assert isinstance(program, SteppedProgram)
    return program


def test_all_but_the_segments_is_there(whole: Path) -> None:
    opened, program = Bundle.open(whole), program_of(whole)
    manifest = opened.manifest
    assert set(manifest.unfinished) == set(program.segments.values())
    on_disk = {str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()}
    assert (program.files - set(manifest.unfinished)) | {"program.json", "manifest.json"} == on_disk
    assert opened.damaged() == []
    assert manifest.versions.keys() == {"step35-trt", "triton"}
    assert any("W8A16" in note for note in manifest.notes)
    assert (program.ranks, len(program.shares)) == (2, 2)
    assert {step.kind for step in program.decoder.steps} == {"segment", "kernel", "collective"}


def test_kernels_are_for_what_a_rank_holds(whole: Path) -> None:
    kernels = {kernel.name: kernel for kernel in program_of(whole).kernels}
    heads = {name.split("-")[2] for name in kernels if name.startswith("decode-")}
    assert heads == {"8x1x16", "12x1x16"}
    assert kernels["route_selection"].constants["EXPERTS"] == 8
    assert kernels["count_pairs"].code.endswith(".cubin")
    placed = [kernel for name, kernel in kernels.items() if name.startswith("place_pairs")]
    assert {kernel.constants["ALL"] for kernel in placed} == {4}
    facts = Facts.model_validate_json((whole / kernels["combine"].launch).read_bytes())
    assert facts.target == "sm_90"
    assert (whole / kernels["combine"].code).read_bytes()[:4] == b"\x7fELF"


@pytest.mark.parametrize(
    ("recipe", "parallelism"),
    [
        ("fp8", Parallelism()),
        ("fp8", Parallelism(attention="replicated", head="replicated")),
        ("fp8-official", Parallelism(attention="replicated", experts="tensor", mlp="replicated")),
        ("int4-awq", Parallelism(attention="replicated", experts="tensor")),
        ("int4-experts-fp8", Parallelism()),
    ],
    ids=["fp8", "experts", "blocks", "int4-cut", "int4-dealt"],
)
def test_every_rank_has_its_share(plain: Path, tmp_path: Path, recipe: str, parallelism: Parallelism) -> None:
    """Bit by bit what the checkpoint holds, stored once where both ranks take it, and mapped, not copied."""
    spec = PAIR.model_copy(update={"recipe": recipe, "parallelism": parallelism})
    source = quantised(plain, tmp_path / "made", spec)
    build(source.directory, tmp_path / "bundle", spec)
    program = program_of(tmp_path / "bundle")
    made = Deployment.of_bundle(Bundle.open(tmp_path / "bundle"))
    wanted = as_kernels_scale(source)
    assert not program.weights.keys() & program.shares[0].keys()
    assert program.shares[0].keys() == program.shares[1].keys() != set()
    for rank in range(2):
        places = program.places(rank)
        assert all(place.offset % 4096 == 0 for place in places.values())
        stored = StoredWeights(tmp_path / "bundle", places, program.experts, program.sharing, rank)
        for name, shape in made.forms.shapes.items():
            form = made.forms(name)
            assert isinstance(stored.mapped(name), np.memmap)
            for expert in made.sharing.held(name, shape[0], rank) if len(shape) == 3 else [None]:
                a = stored.read(name, form, expert)
                b = made.sharing.cut(wanted(name, form, expert), name, rank)
                np.testing.assert_array_equal(a.values, b.values)
                assert (a.scales is None) == (b.scales is None)
                if a.scales is not None and b.scales is not None:
                    np.testing.assert_array_equal(a.scales.astype(np.float32), b.scales.astype(np.float32))
    report = verify.compare_program(tmp_path / "bundle", source.directory, IDS)
    assert report is not None
    assert report.off == ""
    assert {finding.rank for finding in report.comparison.findings} == {0, 1}


def test_a_wrong_share_is_named_with_its_rank(sealed: Path, source: Checkpoint) -> None:
    place = program_of(sealed).shares[1]["model.layers.2.self_attn.q_proj.weight"]
    values = np.memmap(sealed / place.file, np.uint8, "r+", place.offset, place.shape)
    values[...] = values[::-1].copy()
    values.flush()
    record_again(sealed, place.file)
    report = verify.compare_program(sealed, source.directory, IDS)
    assert report is not None
    assert "model.layers.2.self_attn of decoder on rank 1 is the first that is wrong" in report.off
    assert {f.rank for f in report.comparison.findings if not f.passed} == {1}


def test_a_wrong_summand_is_found_in_the_sum(sealed: Path, source: Checkpoint) -> None:
    place = program_of(sealed).shares[1]["model.layers.3.moe.down_proj.weight"]
    values = np.memmap(sealed / place.file, np.uint8, "r+", place.offset, place.shape)
    values[...] = values[::-1].copy()
    values.flush()
    record_again(sealed, place.file)
    report = verify.compare_program(sealed, source.directory, IDS)
    assert report is not None
    assert "model.layers.3 of decoder" in report.off


def test_ranks_compute_the_model_together(whole: Path, plain: Path) -> None:
    """Against the unquantised checkpoint: random weights are not what the recipe's limit is for."""
    report = verify.compare(whole, load_reference(plain), list(range(20)))
    assert {d.name for d in report.differences} == {"decoder", "mtp-0"}
    assert 0 < max(d.mean_kl for d in report.differences) < 0.5


def test_one_gpu_shares_with_nobody(plain: Path, tmp_path: Path) -> None:
    source = quantised(plain, tmp_path / "made", ALONE)
    build(source.directory, tmp_path / "bundle", ALONE)
    program = program_of(tmp_path / "bundle")
    assert (program.ranks, program.shares, program.ways) == (1, (), {})
    report = verify.compare_program(tmp_path / "bundle", source.directory, IDS)
    assert report is not None
    assert report.off == ""


def test_reports_of_the_checkpoint_come_along(source: Checkpoint, tmp_path: Path) -> None:
    made = shutil.copytree(source.directory, tmp_path / "made")
    (made / "reports").mkdir(exist_ok=True)
    (made / "reports" / "quantization.json").write_text('{"said": "of its quantisation"}')
    build(made, tmp_path / "bundle", PAIR)
    kept = tmp_path / "bundle" / "reports" / "quantization.json"
    assert kept.read_text() == '{"said": "of its quantisation"}'
    kept.write_text("{}")
    with pytest.raises(CorruptInputError, match=r"reports/quantization\.json"):
        Bundle.open(tmp_path / "bundle")


# What is refused.


def test_a_loader_says_how_to_finish(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "capabilities", lambda: ["9.0", "9.0"])
    with pytest.raises(UnsupportedError, match=r"is sealed: its \d+ segments are still to be") as caught:
        open_bundle(whole)
    assert caught.value.hint.endswith(f"step35-trt build-engine --finish {whole}")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"devices": 5}, r"cannot share attention over 5 devices: 16 and 24 query heads"),
        ({"devices": 3, "parallelism": Parallelism(attention="replicated")}, "share routed experts over 3"),
        ({"devices": 2, "target": "tensorrt-rtx"}, "TensorRT-RTX runs on one"),
    ],
)
def test_what_devices_cannot_share(
    source: Checkpoint, tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        build(source.directory, tmp_path / "bundle", PAIR.model_copy(update=changes))
    assert list(tmp_path.iterdir()) == []


def test_a_cut_through_a_block_is_refused() -> None:
    forms = Forms(
        {"model.layers.0.mlp.up_proj.weight": (96, 64)}, lambda _: Coding("fp8-blocks", 64), "bfloat16"
    )
    with pytest.raises(UnsupportedError, match="96 rows, 64 of which belong together"):
        Sharing(2, {"dense MLP": "tensor"}).check(forms)


def test_a_rank_holds_as_many_experts_as_a_token_takes(source: Checkpoint) -> None:
    dealt = Sharing(8, {"routed experts": "expert"})
    with pytest.raises(UnsupportedError, match="would hold 1 experts, and a token takes 2"):
        dealt.config(source.config)


def test_an_engine_without_a_gpu(source: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="names no GPU"):
        build(source.directory, tmp_path / "bundle", ALONE.model_copy(update={"hardware": None}))


def test_no_room_is_said_before_anything_is_written(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = estimate_build(source.config, PAIR).nbytes
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=wanted - 1))
    with pytest.raises(DoesNotFitError, match="the bundle needs"):
        build(source.directory, tmp_path / "bundle", PAIR)
    assert list(tmp_path.iterdir()) == []


def test_the_estimate_is_what_is_written(
    whole: Path, source: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    estimate = estimate_build(source.config, PAIR)
    weights = sum(path.stat().st_size for path in (whole / "weights").iterdir())
    assert weights == sum(
        part.nbytes for part in estimate.parts if "weights" in part.what or "experts" in part.what
    )
    counts = {part.what: part.count for part in estimate.parts}
    program = program_of(whole)
    assert counts["segments"] == len(program.segments)
    assert counts["kernels"] == len(program.kernels)
    assert estimate.ranks == 2
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(DoesNotFitError):
        build(source.directory, whole.with_name("other"), PAIR, say=said.append)
    assert said == [estimate.sentence]
    assert f"{len(program.segments)} segments are left for the target" in estimate.sentence


def test_a_tensorrt_here_changes_nothing(
    source: Checkpoint, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine that builds has no say in what the target's TensorRT is."""
    here = bundle.versions("tensorrt")
    monkeypatch.setattr(bundle, "versions", lambda _: here | {"tensorrt": "10.0"})
    build(source.directory, tmp_path / "bundle", PAIR)
    assert contents(tmp_path / "bundle") == contents(whole)
    assert not staging(tmp_path / "bundle").exists()
    assert not build(source.directory, tmp_path / "bundle", PAIR)
