"""ModelOpt's own functions read what was written, and compute the same scales."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from step35_trt.checkpoint import Checkpoint
from step35_trt.quantize.recipe import Recipe
from step35_trt.resources import NANO
from tests.cpu.quantize.test_convert import only, run

if TYPE_CHECKING:
    from pathlib import Path

torch = pytest.importorskip("torch")

LINEAR = "model.layers.1.self_attn.q_proj.weight"
STACKED = "model.layers.4.moe.up_proj.weight"


@pytest.fixture(scope="module")
def quant_utils() -> Any:
    """Imported late: it takes seconds, and every process of the suite collects this file."""
    return pytest.importorskip("modelopt.torch.export.quant_utils")


def loaded(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(checkpoint.tensors[name].file)[name]


@pytest.mark.parametrize("name", [LINEAR, STACKED])
def test_int4_is_packed_as_modelopt_packs(tmp_path: Path, quant_utils: Any, name: str) -> None:
    before, after = Checkpoint.open(NANO), run(NANO, tmp_path / "out", "cpu-int4")
    scales = loaded(after, f"{name}_scale").float()
    packed = quant_utils.to_quantized_weight(
        torch.from_numpy(before.read(name)), scales, quant_utils.QUANTIZATION_INT4_AWQ, None, 128
    )
    assert torch.equal(packed, loaded(after, name))


@pytest.mark.parametrize("name", [LINEAR, "model.layers.4.moe.down_proj.weight"])
def test_fp8_rows_are_modelopts(tmp_path: Path, quant_utils: Any, name: str) -> None:
    before, after = Checkpoint.open(NANO), run(NANO, tmp_path / "out", "fp8")
    weight = torch.from_numpy(before.read(name))
    scales = weight.abs().amax(-1) / 448
    codes = quant_utils.to_quantized_weight(weight, scales, quant_utils.QUANTIZATION_FP8_PC_PT)
    assert torch.equal(scales, loaded(after, f"{name}_scale"))
    assert torch.equal(codes.view(torch.uint8), loaded(after, name).view(torch.uint8))


def test_fp8_blocks_are_modelopts(tmp_path: Path) -> None:
    from modelopt.torch.quantization.qtensor import FP8QTensor

    before, after = Checkpoint.open(NANO), run(NANO, tmp_path / "out", only("fp8-blocks"))
    for name in (LINEAR, "lm_head.weight"):
        weight = torch.from_numpy(before.read(name))
        tensor, scales = FP8QTensor.quantize(weight, block_sizes={-1: 128, -2: 128})
        assert torch.equal(scales, loaded(after, f"{name}_scale_inv"))
        assert torch.equal(tensor._quantized_data.view(torch.uint8), loaded(after, name).view(torch.uint8))
        back = tensor.dequantize(torch.float32, scale=scales, block_sizes={-1: 128, -2: 128})
        np.testing.assert_array_equal(back.numpy(), after.read(name))


def test_int8_is_read_by_modelopt(tmp_path: Path) -> None:
    from modelopt.torch.quantization.qtensor import INT8QTensor

    after = run(NANO, tmp_path / "out", "int4-awq")
    name = "model.embed_tokens.weight"
    codes, scales = loaded(after, name), loaded(after, f"{name}_scale").float()
    back = INT8QTensor(codes.shape, torch.float32, codes).dequantize(scale=scales, block_sizes={-1: 128})
    np.testing.assert_array_equal(back.numpy(), after.read(name))


@pytest.mark.parametrize("recipe", ["fp8", "int4-awq", "int4-experts-fp8", "cpu-int4"])
def test_modelopt_makes_the_same_config_of_hf_quant_config(tmp_path: Path, recipe: str) -> None:
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

    run(NANO, tmp_path / "out", recipe)
    written = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert convert_hf_quant_config_format(written) == config


def test_layers_are_declared_as_modelopt_declares_them(tmp_path: Path, quant_utils: Any) -> None:
    run(NANO, tmp_path / "out", "int4-awq")
    found = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    described = {
        f"{name}.{key}": value
        for name, layer in found["quantized_layers"].items()
        for key, value in (
            ("quantization", FORMATS[layer["quant_algo"]]),
            ("awq_block_size", layer.get("group_size", 0)),
        )
    }
    wanted = quant_utils.process_layer_quant_config(described)
    assert found["quant_algo"] == wanted["quant_algo"] == "MIXED_PRECISION"
    for name, layer in wanted["quantized_layers"].items():
        ours = dict(found["quantized_layers"][name])
        if layer["quant_algo"] == "W4A16_AWQ":
            layer["pre_quant_scale"] = False  # ours is folded
        if layer["quant_algo"] == "W8A16":
            ours.pop("group_size")
        assert ours == layer


FORMATS = {"W4A16_AWQ": "int4_awq", "FP8_PER_CHANNEL_PER_TOKEN": "fp8_pc_pt", "W8A16": "int8_wo"}


def test_one_form_is_declared_without_a_list(tmp_path: Path) -> None:
    run(NANO, tmp_path / "out", "fp8")
    found = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert found["quant_algo"] == "FP8_PER_CHANNEL_PER_TOKEN"
    assert "model.layers.3.moe.gate" in found["exclude_modules"]
    assert "lm_head" not in found["exclude_modules"]
    assert Recipe.load("fp8").kv_cache == "bf16"
    assert found["kv_cache_quant_algo"] is None
