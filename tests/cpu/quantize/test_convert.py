"""A converted checkpoint holds what its recipe's definition says, whatever happens on the way."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import time
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from step35_trt.checkpoint import Checkpoint, expected_tensors
from step35_trt.errors import CorruptInputError, DoesNotFitError, UnsupportedError, UsageError
from step35_trt.quantize import blocks
from step35_trt.quantize.convert import INDEX, conversion_key, convert, is_there
from step35_trt.quantize.folding import CLIP_RATIOS, Folded, Folding, Scaling
from step35_trt.quantize.formats import DTYPES
from step35_trt.quantize.recipe import Recipe, Rule
from step35_trt.resources import NANO, known
from tests.cpu.test_build import contents, in_child
from tests.synthetic import raw_config, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from step35_trt.quantize.formats import Coding

EXPERTS = "model.layers.4.moe.up_proj.weight"
TINY = {"layers": 5, "modules": 1}


def run(source: Path, out: Path, recipe: Recipe | str, folding: Folding | None = None) -> Checkpoint:
    checkpoint = Checkpoint.open(source)
    chosen = Recipe.load(recipe) if isinstance(recipe, str) else recipe
    convert(checkpoint, out, chosen, conversion_key(checkpoint, chosen), folding)
    return Checkpoint.open(out)


def only(precision: str, block: int = 128) -> Recipe:
    """Every matrix in one precision."""
    rules = [("*norm.weight", "bf16", 128), ("*router_bias", "fp32", 128), ("*", precision, block)]
    rule = [Rule.model_validate({"weights": w, "precision": p, "block": b}) for w, p, b in rules]
    return Recipe(name="only", summary="", max_mean_kl=1, rules=tuple(rule))


def defined(weight: np.ndarray, coding: Coding, ratios: np.ndarray | None = None) -> np.ndarray:
    """What a weight becomes, by the definition in numpy."""
    if coding.kind == "fp32":
        return weight
    if coding.kind == "bf16":
        return weight.astype(ml_dtypes.bfloat16).astype(np.float32)
    if coding.kind.startswith("fp8"):
        k = weight.shape[-1]
        rows, columns = (coding.block, coding.block) if coding.kind == "fp8-blocks" else (1, k)
        codes, scales = blocks.fp8(weight, rows, columns)
        full = scales.repeat(rows, -2)[..., : weight.shape[-2], :].repeat(columns, -1)[..., :k]
        return codes.astype(np.float32) * full
    codes, scales = blocks.integers(weight, int(coding.kind[3:]), coding.block, ratios)
    return codes.astype(np.float32) * scales.astype(np.float32).repeat(coding.block, -1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "tiny", raw_config(**TINY))


@pytest.mark.parametrize("recipe", known("export"))
def test_every_recipe_is_its_definition(source: Path, tmp_path: Path, recipe: str) -> None:
    """Vocabulary 97 and experts of 32: odd rows and cut blocks are in it."""
    before, after = Checkpoint.open(source), run(source, tmp_path / "out", recipe)
    wanted = Recipe.load(recipe)
    for name, shape in expected_tensors(before.config).items():
        coding = wanted.coding(name, shape)
        assert after.codings[name] == coding
        np.testing.assert_array_equal(after.read(name), defined(before.read(name), coding), name)
    assert not list(tmp_path.glob("*.partial"))


def test_what_the_shipped_recipes_keep() -> None:
    """Router and its bias in fp32 (specification 2.8), norms and gates unquantised, heads never in int4."""
    for name in ("fp8", "int4-awq", "int4-experts-fp8", "cpu-int4"):
        recipe = Recipe.load(name)
        assert recipe.rule("model.layers.3.moe.gate.weight").precision == "fp32"
        assert recipe.rule("model.layers.3.moe.router_bias").precision == "fp32"
        assert recipe.rule("model.layers.3.self_attn.g_proj.weight").precision in ("bf16", "fp32")
        assert recipe.rule("model.layers.45.enorm.weight").precision in ("bf16", "fp32")
    awq = Recipe.load("int4-awq")
    assert awq.calibration is not None
    assert awq.rule("lm_head.weight").precision == "fp8-rows"
    assert awq.rule("model.layers.45.transformer.shared_head.output.weight").precision == "fp8-rows"
    assert awq.rule("model.layers.45.eh_proj.weight").precision == "int4"


@pytest.mark.parametrize("precision", ["fp8-rows", "int8", "int4"])
def test_slices_of_every_format(source: Path, tmp_path: Path, precision: str) -> None:
    after = run(source, tmp_path / "out", only(precision, 16))
    for name in ("lm_head.weight", EXPERTS):
        whole = after.read(name)
        np.testing.assert_array_equal(after.read(name, slice(3, 8)), whole[3:8])
        np.testing.assert_array_equal(after.read(name, 7), whole[7])


def test_blocks_of_a_matrix_can_be_read_in_slices(source: Path, tmp_path: Path) -> None:
    after = run(source, tmp_path / "out", only("fp8-blocks", 16))
    whole = after.read("lm_head.weight")
    np.testing.assert_array_equal(after.read("lm_head.weight", slice(13, 50)), whole[13:50])


def test_official_blocks_pass_through_untouched(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "first", "fp8-official")
    first = {n: v for f in (tmp_path / "first").glob("*.safetensors") for n, v in raw(f).items()}
    second = run(tmp_path / "first", tmp_path / "second", "fp8-official")
    for name, value in first.items():
        if ".moe." in name and "_proj" in name:
            assert second.stored(name).tobytes() == value, name
    # ... and not because scaling twice is harmless: other scales stay other scales.
    scale = f"{EXPERTS}_scale_inv"
    change(tmp_path / "first", scale, lambda v: v * np.float32(1.37))
    changed = Checkpoint.open(tmp_path / "first").stored(scale).tobytes()
    third = run(tmp_path / "first", tmp_path / "third", "fp8-official")
    assert third.stored(scale).tobytes() == changed
    declared = json.loads((tmp_path / "third" / "config.json").read_text())["quantization_config"]
    assert declared["weight_block_size"] == [128, 128]
    assert "model.layers.3.moe.gate" in declared["modules_to_not_convert"]


def raw(file: Path) -> dict[str, bytes]:
    """Names and bytes of all tensors."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__")
    return {n: data[8 + size :][slice(*e["data_offsets"])] for n, e in header.items()}


def change(directory: Path, tensor: str, edit: object) -> None:
    """Edit a stored tensor in place."""
    assert callable(edit)
    stored = Checkpoint.open(directory).tensors[tensor]
    values = np.memmap(stored.file, DTYPES[stored.dtype], "r+", stored.offset, stored.shape)
    values[:] = edit(np.array(values))
    values.flush()


def test_files_are_ordinary_safetensors(source: Path, tmp_path: Path) -> None:
    after = run(source, tmp_path / "out", "int4-awq")
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert set(index["weight_map"]) == set(after.tensors)
    for file in set(index["weight_map"].values()):
        with safe_open(tmp_path / "out" / file, "numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert set(opened.keys()) == {n for n, f in index["weight_map"].items() if f == file}
    assert all(tensor.offset % 4 == 0 for tensor in after.tensors.values() if tensor.dtype == "F32")


def test_nano_keeps_tokenizer_and_modules(tmp_path: Path) -> None:
    after = run(NANO, tmp_path / "out", "int4-experts-fp8")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (NANO / name).read_bytes()
    assert not list((tmp_path / "out").glob("*.py"))
    assert after.config.num_nextn_predict_layers == 3
    assert after.codings["model.layers.9.eh_proj.weight"].kind == "fp8-rows"


def test_the_same_command_again_finds_it_done(source: Path, tmp_path: Path) -> None:
    checkpoint, recipe = Checkpoint.open(source), Recipe.load("fp8")
    key = conversion_key(checkpoint, recipe)
    assert not is_there(tmp_path / "out", key)
    run(source, tmp_path / "out", "fp8")
    assert is_there(tmp_path / "out", key)
    with pytest.raises(UsageError, match="not this conversion's result"):
        is_there(tmp_path / "out", conversion_key(checkpoint, Recipe.load("bf16")))
    assert conversion_key(checkpoint, recipe, ["other text"]) != key


def test_twenty_kills_at_random_moments(tmp_path: Path) -> None:
    """Whatever SIGKILL interrupts, the same command ends with the bytes of an uninterrupted run."""
    started = time.perf_counter()
    run(NANO, tmp_path / "whole", "int4-experts-fp8")
    whole, takes = contents(tmp_path / "whole"), time.perf_counter() - started
    moments, killed, shards = random.Random(0), 0, set()
    for trial in range(20):
        out = tmp_path / f"trial-{trial}"
        child = os.fork()
        if child == 0:
            try:
                run(NANO, out, "int4-experts-fp8")
            finally:
                os._exit(0)
        time.sleep(moments.uniform(0, 1.2 * takes))
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        partial = out.with_name(out.name + ".partial")
        shards.add(len(list(partial.glob("*.safetensors"))) if partial.is_dir() else -1)
        if not out.exists():
            run(NANO, out, "int4-experts-fp8")
        assert contents(out) == whole
        shutil.rmtree(out)
    assert killed >= 5
    assert len(shards) >= 3  # they did hit different moments


def test_finished_shards_are_not_written_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from step35_trt.quantize import convert as module

    wrote: list[str] = []
    write = module._write_shard

    def stop_after_three(converter, shard, targets, stage):  # type: ignore[no-untyped-def]
        wrote.append(shard.name)
        if len(wrote) == 4:
            raise KeyboardInterrupt
        yield from write(converter, shard, targets, stage)

    monkeypatch.setattr(module, "_write_shard", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out", "fp8")
    monkeypatch.setattr(module, "_write_shard", write)
    first = wrote[:2]  # the third may not have been recorded
    stamps = {name: (tmp_path / "out.partial" / name).stat().st_mtime_ns for name in first}
    run(source, tmp_path / "out", "fp8")
    assert stamps == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in first}


@pytest.mark.parametrize("recipe", ["bf16", "fp8", "int4-awq", "fp8-official", "fp32"])
@pytest.mark.parametrize("name", [EXPERTS, "model.layers.1.self_attn.o_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_named(
    source: Path, tmp_path: Path, recipe: str, name: str, bad: float
) -> None:
    copy = shutil.copytree(source, tmp_path / "copy")

    def spoil(values: np.ndarray) -> np.ndarray:
        values.reshape(-1)[-1] = bad
        return values

    change(copy, name, spoil)
    with pytest.raises(CorruptInputError, match=f"^{name} holds a NaN"):
        run(copy, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_a_nan_among_official_codes(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "first", "fp8-official")

    def spoil(values: np.ndarray) -> np.ndarray:
        values.view(np.uint8).reshape(-1)[5] = 0xFF
        return values

    change(tmp_path / "first", EXPERTS, spoil)
    with pytest.raises(CorruptInputError, match=f"^{EXPERTS} holds a NaN"):
        run(tmp_path / "first", tmp_path / "second", "fp8-official")


@pytest.mark.parametrize("recipe", ["fp8", "int4-awq", "fp8-official", "cpu-int4"])
def test_a_block_of_zeros(source: Path, tmp_path: Path, recipe: str) -> None:
    copy = shutil.copytree(source, tmp_path / "copy")
    for name in (EXPERTS, "model.layers.1.self_attn.o_proj.weight", "lm_head.weight"):
        change(copy, name, np.zeros_like)
    after = run(copy, tmp_path / "out", recipe)
    assert not after.read(EXPERTS).any()
    assert all(np.isfinite(after.read(name)).all() for name in expected_tensors(after.config))
    scale = after.codings[EXPERTS].scale_name(EXPERTS)
    assert scale is None or (after.stored(scale).astype(np.float32) == 1).all()


def test_a_full_disk_is_a_sentence_and_loses_nothing(source: Path, tmp_path: Path) -> None:
    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        try:
            run(source, tmp_path / "out", "fp32")
        except DoesNotFitError as error:
            os._exit(3 if "no room left" in error.message else 4)

    assert os.waitstatus_to_exitcode(in_child(limited)) == 3
    run(source, tmp_path / "out", "fp32")


def test_a_vector_cannot_be_quantised(source: Path, tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        {"name": "r", "summary": "", "max_mean_kl": 1, "rules": [{"weights": "*", "precision": "int4"}]}
    )
    with pytest.raises(
        UnsupportedError, match=r"quantises model\.layers\.0\.input_layernorm\.weight, a vector"
    ):
        run(source, tmp_path / "out", recipe)


def test_a_folding_is_applied_before_quantising(source: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    before = Checkpoint.open(source)
    experts, n, k = before.shape(EXPERTS)
    norm, plain = "model.layers.4.post_attention_layernorm.weight", "model.layers.4.self_attn.v_proj.weight"
    factor = rng.uniform(0.5, 2, k).astype(np.float32)
    clip = rng.integers(0, len(CLIP_RATIOS), (experts, n, k // 64)).astype(np.uint8)
    rows = rng.uniform(0.5, 2, (experts, n)).astype(np.float32)
    scalings = {
        norm: Scaling(rows=1 / factor),
        EXPERTS: Scaling(rows=rows, columns=factor, clip=clip),
        plain: Scaling(rows=rng.uniform(0.5, 2, before.shape(plain)[0]).astype(np.float32)),
    }
    folding = Folding(scalings)
    folding.save(tmp_path / "folding.safetensors")
    loaded = Folding.load(tmp_path / "folding.safetensors")
    assert loaded.digest() == folding.digest() != Folding().digest()
    after, seen = run(source, tmp_path / "out", "int4-awq", loaded), Folded(before, loaded)

    folded_norm = (before.read(norm) + 1) * (1 / factor) - 1
    np.testing.assert_array_equal(after.read(norm), folded_norm)
    assert after.codings[norm].kind == "fp32"
    folded = before.read(EXPERTS) * rows[..., None] * factor
    np.testing.assert_array_equal(seen.read(EXPERTS), folded)
    np.testing.assert_array_equal(seen.read(EXPERTS, 2), folded[2])
    np.testing.assert_array_equal(seen.read(EXPERTS, slice(1, 3)), folded[1:3])
    np.testing.assert_array_equal(seen.read(norm, slice(3, 9)), folded_norm[3:9])
    np.testing.assert_array_equal(
        after.read(EXPERTS), defined(folded, after.codings[EXPERTS], CLIP_RATIOS[clip])
    )
    np.testing.assert_array_equal(
        seen.read(plain, slice(2, 5)), before.read(plain)[2:5] * scalings[plain].rows[2:5, None]
    )


def test_a_folding_of_another_recipe(source: Path, tmp_path: Path) -> None:
    clip = np.zeros((12, 32, 4), np.uint8)
    with pytest.raises(UnsupportedError, match="groups of another recipe"):
        run(source, tmp_path / "out", "int4-awq", Folding({EXPERTS: Scaling(clip=clip)}))


def test_not_a_folding(tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"\0" * 64)
    with pytest.raises(CorruptInputError, match="not a folding"):
        Folding.load(tmp_path / "bad")
    save_file({"x.weight.rows": np.zeros(3, np.int32)}, tmp_path / "ints")
    with pytest.raises(CorruptInputError, match=r"x\.weight\.rows is int32"):
        Folding.load(tmp_path / "ints")


@pytest.mark.parametrize("recipe", ["int4-awq", "fp8"])
def test_missing_or_misshapen_scales(source: Path, tmp_path: Path, recipe: str) -> None:
    run(source, tmp_path / "out", recipe)
    name = "model.layers.1.self_attn.q_proj.weight"
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    file = tmp_path / "out" / index["weight_map"][name]
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    for edit in (b"_scalE", b"_scale"):
        header = data[8 : 8 + size].replace(b'q_proj.weight_scale"', b"q_proj.weight" + edit + b'"')
        if edit == b"_scale":
            shape = json.loads(header)[f"{name}_scale"]["shape"]
            other = [2 * shape[0], *shape[1:]] if len(shape) == 1 else [shape[0] // 2, 2 * shape[1]]
            old, new = (json.dumps(s, separators=(",", ":")).encode() for s in (shape, other))
            at = header.index(b'q_proj.weight_scale"')
            header = header[:at] + header[at:].replace(old, new, 1)
            header = header.rstrip() + b" " * (size - len(header.rstrip()))
        file.write_bytes(data[:8] + header + data[8 + size :])
        with pytest.raises(CorruptInputError):
            Checkpoint.open(tmp_path / "out")


def test_an_int4_checkpoint_is_not_mistaken_for_bf16(source: Path, tmp_path: Path) -> None:
    """Control: the reader's values are the codes', not the bytes'."""
    after = run(source, tmp_path / "out", "cpu-int4")
    assert load_file(after.tensors[EXPERTS].file)[EXPERTS].dtype == np.uint8
    assert after.shape("lm_head.weight") == (97, 64)
    assert after.stored("lm_head.weight").shape == (49, 64)
