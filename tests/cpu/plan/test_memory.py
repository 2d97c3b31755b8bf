"""Bytes: the specification's tables (7.1, 7.2), a bundle's real files, and every line by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from step35_trt.build import build
from step35_trt.config import Step35Config
from step35_trt.engine import EngineSpec
from step35_trt.plan import weight_cost
from step35_trt.plan.memory import Footprint, kv_bytes, weigh
from step35_trt.plan.parameters import Parameter, parameters
from step35_trt.plan.plan import make_plan
from step35_trt.plan.splits import Shares
from step35_trt.quantize import formats
from step35_trt.quantize.recipe import Recipe
from tests.cpu.test_config import published
from tests.synthetic import raw_config, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

GB, GIB, K = 1e9, 2.0**30, 1024


@pytest.mark.parametrize(
    ("context", "gib", "all_full"), [(32, 1.564, 5.625), (128, 6.064, 22.5), (256, 12.064, 45.0)]
)
def test_caches_of_the_specification(step35: Step35Config, context: int, gib: float, all_full: float) -> None:
    """Specification 7.1."""
    plan = make_plan(step35, EngineSpec.load("dgx-spark-int4"))
    cache = next(c for c in plan.caches if c.context == context * K)
    assert round(cache.nbytes / GIB, 3) == gib
    assert cache.all_full / GIB == all_full
    assert kv_bytes(step35.layers, context * K, 1) * 2 == cache.nbytes


@pytest.mark.parametrize(
    ("name", "main", "with_modules"),
    [
        ("BF16", 393.9, 398.8),
        ("FP8 experts", 203.7, 208.6),
        ("INT4 experts", 111.5, 116.4),
        ("NVFP4 experts", 120.4, 125.3),
        ("INT4 in groups", 101.6, None),
    ],
)
def test_formats_of_the_specification(
    step35: Step35Config, name: str, main: float, with_modules: float | None
) -> None:
    """Specification 7.2, in GB."""
    plan = make_plan(step35, EngineSpec.load("h200-int4"))
    (row,) = (f for f in plan.formats if f.name.startswith(name))
    assert round(row.main / GB, 1) == main
    if with_modules:
        assert round(row.with_modules / GB, 1) == with_modules


@pytest.mark.parametrize(("recipe", "gb"), [("bf16", 393.9), ("fp8-official", 203.7)])
def test_shipped_recipes_of_published_formats(step35: Step35Config, recipe: str, gb: float) -> None:
    """Ours differ from the specification's by a router kept in fp32, a tenth of a GB."""
    weights = weigh(step35, weight_cost.of_recipe(Recipe.load(recipe), cpu=False), Shares.whole(step35))
    main = sum(w.nbytes for w in weights if not w.group.startswith("MTP"))
    assert main / GB == pytest.approx(gb, abs=0.15)


@pytest.mark.parametrize("recipe", ["bf16", "fp8-official", "fp8", "int4-awq", "int4-experts-fp8"])
def test_a_weight_takes_what_is_stored(step35: Step35Config, recipe: str) -> None:
    """Codes and scales as `quantize.formats` lays them out, byte for byte."""
    chosen = Recipe.load(recipe)
    cost_of = weight_cost.of_recipe(chosen, cpu=False)
    seen = set()
    for parameter in parameters(step35):
        stored = chosen.coding(parameter.name, parameter.shape)
        assert stored is not None
        entries = stored.entries(parameter.name, parameter.shape).values()
        size = sum(math.prod(shape) * formats.DTYPES[dtype].itemsize for dtype, shape in entries)
        assert cost_of(parameter).nbytes(parameter.shape) == size, parameter.name
        seen.add(stored.kind)
    assert len(seen) > 1


def test_a_bundle_holds_what_was_planned(tmp_path: Path) -> None:
    raw = raw_config(hidden_size=256, moe_intermediate_size=128, share_expert_dim=128, vocab_size=256)
    raw |= {"intermediate_size": 256, "num_attention_heads": 16}
    raw["attention_other_setting"]["num_attention_heads"] = 16
    source, spec = write_checkpoint(tmp_path / "c", raw), EngineSpec.load("cpu-int4")
    build(source, tmp_path / "b", spec)
    stored = 0
    for file in (tmp_path / "b" / "weights").glob("*.safetensors"):
        with safe_open(file, "numpy") as tensors:
            names = [name for name in tensors.keys() if not name.endswith(".padding")]  # noqa: SIM118
            stored += sum(tensors.get_tensor(name).nbytes for name in names)
    assert stored == sum(w.nbytes for w in make_plan(Step35Config.load(source), spec).weights)


def test_the_cost_of_blocks_that_do_not_divide() -> None:
    """Scales of cut blocks count; whole rows have one."""
    assert weight_cost.FP8_BLOCKS.nbytes((3, 200, 130)) == 3 * (200 * 130 + 2 * 2 * 4)
    assert weight_cost.FP8_ROWS.nbytes((200, 130)) == 200 * 130 + 200 * 4
    assert weight_cost.INT4_128.nbytes((8, 256)) == 8 * (128 + 2 * 2)
    assert weight_cost.NVFP4.nbytes((8, 256)) == 8 * (128 + 16)


def _footprint(config: Step35Config, name: str, **changes: object) -> Footprint:
    spec = EngineSpec.load(name).model_copy(update=changes)
    cost_of = weight_cost.of_recipe(Recipe.load(spec.recipe), cpu=False)
    return Footprint.of(config, spec, cost_of, Shares.of(config, spec.parallelism, spec.devices, cost_of), 2)


def test_every_line_of_the_memory_table(step35: Step35Config) -> None:
    footprint = _footprint(step35, "dgx-spark-int4", prefill_chunk=1000)
    memory = footprint.at(context=300, sequences=2, drafts=2)
    lines = {item.what: item.nbytes for item in memory.items}
    row = 2 * 8 * 128 * 2
    # Three pages of 128 rows a sequence; window layers keep eight windows of 5 pages for later sequences.
    assert lines["KV cache"] == (12 * 6 + 33 * (6 + 40)) * 128 * row
    assert lines["KV cache of the MTP modules"] == 2 * (6 + 40) * 128 * row
    # The dense MLP is wider than eight experts: gate, up and product of 11264.
    assert lines["workspace"] == 1000 * (2 * 4096 + 3 * 11264) * 2 + 2 * 3 * 128896 * 4
    assert footprint.workspace(500, 2) == 1500 * (2 * 4096 + 3 * 11264) * 2 + 1500 * 128896 * 4
    assert {"operating system", "desktop", "page cache", "CUDA context and compiled code"} <= lines.keys()
    modules = sum(w.nbytes for w in footprint.weights if w.group.startswith("MTP"))
    assert lines["MTP modules (2)"] == pytest.approx(modules * 2 / 3, abs=1)
    assert memory.free == 128_000_000_000 - sum(lines.values())
    long = footprint.at(context=1000, sequences=1, drafts=0)
    assert long.items[2].nbytes == (12 * 8 + 33 * (8 + 40)) * 128 * row
    shared = footprint.at(context=1000, sequences=4, drafts=0, cached=1500)
    assert shared.items[2].nbytes == (12 * 12 + 33 * (2 * 4 + (4 * 517 + 1000) // 128 + 40)) * 128 * row
    assert footprint.kv(step35.layers, 1000, 1) == (12 * 1000 + 33 * 512) * row


def test_a_cpu_takes_what_sequences_need(step35: Step35Config) -> None:
    footprint = _footprint(step35, "cpu-int4")
    assert footprint.caches(step35.layers, 1000, 2) == footprint.kv(step35.layers, 1000, 2)


@given(
    context=st.integers(1, 300_000),
    sequences=st.integers(1, 100),
    drafts=st.integers(0, 3),
    more=st.integers(1, 99),
)
def test_more_of_anything_needs_no_less(context: int, sequences: int, drafts: int, more: int) -> None:
    """What the search for the nearest that fits rests on."""
    footprint = _PUBLISHED
    needed = footprint.at(context, sequences, drafts).needed
    assert footprint.at(context + more, sequences, drafts).needed >= needed
    assert footprint.at(context, sequences + more, drafts).needed > needed
    assert drafts == 3 or footprint.at(context, sequences, drafts + 1).needed > needed


_PUBLISHED = _footprint(Step35Config.parse(published()), "h200-int4")


@pytest.mark.parametrize("devices", [2, 8])
def test_devices_share(step35: Step35Config, devices: int) -> None:
    """What is shared divides exactly; routers, norms, the embedding and the modules' joins do not."""
    one, many = _footprint(step35, "h100x8-fp8", devices=1), _footprint(step35, "h100x8-fp8", devices=devices)
    for whole, part in zip(one.weights, many.weights, strict=True):
        assert whole.nbytes == part.nbytes == whole.on_device
        if whole.group in ("router", "norms", "embedding"):
            assert part.on_device == whole.nbytes
        elif whole.group in ("routed experts", "shared expert", "dense MLP", "head"):
            assert part.on_device == pytest.approx(whole.nbytes / devices, abs=1)
        else:  # q and k norms stay whole
            assert whole.nbytes / devices <= part.on_device < whole.nbytes
    assert many.kv(step35.layers, 4096, 3) * devices == one.kv(step35.layers, 4096, 3)


def test_attention_that_is_copied_keeps_its_caches_whole(step35: Step35Config) -> None:
    engine = EngineSpec.load("h200x2-fp8")
    copied = engine.parallelism.model_copy(update={"attention": "replicated"})
    shared = _footprint(step35, "h200x2-fp8").kv(step35.layers, 4096, 1)
    assert _footprint(step35, "h200x2-fp8", parallelism=copied).kv(step35.layers, 4096, 1) == 2 * shared


def test_what_no_block_divides_is_kept_as_the_engine_keeps_what_is_not_quantised() -> None:
    uneven = Parameter("model.layers.3.share_expert.down_proj.weight", (256, 72), "shared expert", 3)
    for recipe, cpu, bits in (("cpu-int4", True, 32), ("int4-awq", False, 16)):
        assert weight_cost.of_recipe(Recipe.load(recipe), cpu=cpu)(uneven).bits == bits


def test_vectors_follow_the_recipe() -> None:
    recipe = Recipe.load("int4-awq")
    bias = Parameter("model.layers.3.moe.router_bias", (288,), "router", 3)
    norm = replace(bias, name="model.layers.3.input_layernorm.weight")
    cost_of = weight_cost.of_recipe(recipe, cpu=False)
    assert (cost_of(bias).bits, cost_of(norm).bits) == (32, 16)
