"""Engine specs: what ships is whole, old ones are still read, and nonsense is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from step35_trt.build import build
from step35_trt.engine import EngineSpec
from step35_trt.errors import UnsupportedError, UsageError
from step35_trt.hardware import Hardware
from step35_trt.quantize.recipe import Recipe
from step35_trt.resources import known

if TYPE_CHECKING:
    from pathlib import Path

SPARK: dict[str, Any] = {"name": "x", "summary": "", "target": "tensorrt-rtx", "recipe": "int4-awq"}


def test_the_deployments_ship() -> None:
    deployments = {"cpu-fp32", "cpu-int4", "dgx-spark-int4", "h200-int4", "h200x2-fp8", "h100x8-fp8"}
    assert deployments <= set(known("engines"))


@pytest.mark.parametrize("name", known("engines"))
def test_shipped_engines(name: str) -> None:
    spec = EngineSpec.load(name)
    assert spec.name == name
    assert Recipe.load(spec.recipe).name == spec.recipe
    assert spec.hardware is not None
    if spec.target != "cpu":
        assert spec.hardware.compute_capability
        assert spec.max_tokens
    assert EngineSpec.model_validate_json(spec.model_dump_json()) == spec  # as a manifest keeps it


def test_the_facts_of_the_targets() -> None:
    spark, h200, h100 = (EngineSpec.load(n).hardware for n in ("dgx-spark-int4", "h200-int4", "h100x8-fp8"))
    assert spark is not None
    assert h200 is not None
    assert h100 is not None
    assert (spark.compute_capability, spark.memory, spark.bandwidth) == ("12.1", 128e9, 273e9)
    assert (h200.compute_capability, h200.memory, h200.bandwidth) == ("9.0", 141e9, 4.8e12)
    assert (h100.compute_capability, h100.memory, h100.bandwidth) == ("9.0", 80e9, 3.35e12)
    assert (spark.unified, h200.unified, h100.unified) == (True, False, False)
    assert EngineSpec.load("h200x2-fp8").hardware == h200


def test_a_manifest_from_before_hardware_is_read() -> None:
    old = {
        "name": "cpu-int4",
        "summary": "",
        "target": "cpu",
        "recipe": "cpu-int4",
        "max_tokens": None,
        "prefill_chunk": 512,
        "draft_tokens": 3,
    }
    spec = EngineSpec.model_validate(old)
    assert spec.hardware is None
    assert (spec.devices, spec.max_sequences) == (1, 1)


def test_unknown_hardware_is_named() -> None:
    with pytest.raises(UsageError) as caught:
        EngineSpec.model_validate(SPARK | {"hardware": "h300"})
    assert "h300" in caught.value.message
    assert "dgx-spark" in caught.value.hint


def test_devices_need_a_link() -> None:
    with pytest.raises(ValidationError, match="link"):
        EngineSpec.model_validate(SPARK | {"hardware": "dgx-spark", "devices": 2})
    assert EngineSpec.model_validate(SPARK | {"hardware": "h200", "devices": 2}).devices == 2


@pytest.mark.parametrize(
    "change",
    [
        {"memory": 0},
        {"bandwidth": -1},
        {"compute_capability": "sm_90"},
        {"operations": {}},
        {"operations": {"fp3": 1.0}},
        {"operations": {"bf16": 1.0}},
        {"speed": 1},
    ],
)
def test_nonsense_hardware(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Hardware.model_validate(Hardware.load("h200").model_dump() | change)


def test_kinds_without_a_rate_run_in_fp32() -> None:
    machine = Hardware.load("xeon-128g")
    assert machine.rate("int8") == machine.operations["int8"] > machine.operations["fp32"]
    assert machine.rate("bf16") == machine.operations["fp32"]


def test_what_is_only_planned_is_not_built_for_the_cpu(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="dgx-spark-int4"):
        build(checkpoints["small-window"], tmp_path / "b", EngineSpec.load("dgx-spark-int4"))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", r"x\.yaml: Input should be a valid dictionary"),
        ("[" * 100_000, "cannot be read as YAML"),
        ("a: [", "cannot be read as YAML"),
        ("{name: x, summary: s, target: cpu, recipe: fp32, max_sequences: 2147483648}", "max_sequences"),
        ("{name: x, summary: s, target: cpu, recipe: fp32, prefill_chunk: .inf}", "prefill_chunk"),
    ],
)
def test_hostile_files(tmp_path: Path, content: str, complaint: str) -> None:
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(UsageError, match=complaint) as caught:
        EngineSpec.load(str(tmp_path / "x.yaml"))
    assert "\n" not in caught.value.message
