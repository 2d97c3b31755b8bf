"""Checkpoints are read slice by slice, and a damaged one is one sentence."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from step35_trt.checkpoint import Checkpoint, expected_tensors
from step35_trt.config import Step35Config
from step35_trt.errors import CorruptInputError, Step35Error, UnsupportedError
from tests.cpu.test_config import published
from tests.synthetic import random_weights, raw_config, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [16, 16]}


@pytest.fixture
def copy(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(checkpoints["small-window"], tmp_path / "checkpoint")


def test_published_parameter_count() -> None:
    """Specification sections 4 and 5: 753 and 51 tensors, 196,956,130,368 and 2,428,171,008 parameters."""
    shapes = expected_tensors(Step35Config.parse(published()))
    mtp = {
        name for name in shapes if name.startswith(("model.layers.45", "model.layers.46", "model.layers.47"))
    }
    assert len(shapes) - len(mtp) == 753
    assert len(mtp) == 51
    assert sum(int(np.prod(shapes[name])) for name in shapes if name not in mtp) == 196_956_130_368
    assert sum(int(np.prod(shapes[name])) for name in mtp) == 2_428_171_008


def test_values_and_slices(checkpoints: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(checkpoints["small-window"])
    weights = random_weights(checkpoint.config, seed=0)
    for name, value in weights.items():
        np.testing.assert_array_equal(checkpoint.read(name), value.astype(np.float32))
    name = "model.layers.5.moe.up_proj.weight"
    np.testing.assert_array_equal(checkpoint.read(name, 7), weights[name][7].astype(np.float32))
    np.testing.assert_array_equal(checkpoint.read(name, slice(2, 4)), weights[name][2:4].astype(np.float32))


def test_nothing_stays_mapped(checkpoints: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(checkpoints["small-window"])
    for name in checkpoint.tensors:
        checkpoint.read(name)
    with open("/proc/self/maps", encoding="utf-8") as maps:
        assert str(checkpoints["small-window"]) not in maps.read()


def test_official_fp8_experts(tmp_path: Path) -> None:
    """Blocks are multiplied by their own scale; edges that do not fill a block as well."""
    raw = raw_config(moe_intermediate_size=40) | {"quantization_config": FP8}
    write_checkpoint(tmp_path, raw, shards=1)
    file = next(tmp_path.glob("*.safetensors"))
    tensors, name = load_file(file), "model.layers.4.moe.down_proj.weight"
    rng = np.random.default_rng(0)
    codes = rng.normal(0, 1, tensors[name].shape).astype(ml_dtypes.float8_e4m3fn)
    experts, rows, columns = codes.shape
    scales = rng.uniform(0.5, 2, (experts, -(-rows // 16), -(-columns // 16))).astype(np.float32)
    _save_with_fp8(file, tensors | {name: codes, f"{name}_scale_inv": scales})
    checkpoint = Checkpoint.open(tmp_path)
    expected = codes.astype(np.float32)
    for r in range(rows):
        for c in range(columns):
            expected[:, r, c] *= scales[:, r // 16, c // 16]
    np.testing.assert_array_equal(checkpoint.read(name), expected)
    np.testing.assert_array_equal(checkpoint.read(name, 3), expected[3])


def _save_with_fp8(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """safetensors' numpy writer does not know FP8: write bytes and mend the header."""
    names = [name for name, value in tensors.items() if value.dtype == ml_dtypes.float8_e4m3fn]
    save_file({n: v.view(np.uint8) if n in names else v for n, v in tensors.items()}, file)
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    for name in names:
        header[name]["dtype"] = "F8_E4M3"
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def test_fp8_without_scales(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, raw_config() | {"quantization_config": FP8}, shards=1)
    file = next(tmp_path.glob("*.safetensors"))
    tensors, name = load_file(file), "model.layers.4.moe.up_proj.weight"
    _save_with_fp8(file, tensors | {name: tensors[name].astype(ml_dtypes.float8_e4m3fn)})
    with pytest.raises(CorruptInputError, match="weight_scale_inv"):
        Checkpoint.open(tmp_path)


def _message(directory: Path) -> str:
    with pytest.raises(Step35Error) as caught:
        Checkpoint.open(directory)
    assert "\n" not in caught.value.message
    return caught.value.message


def test_truncated_shard(copy: Path) -> None:
    shard = sorted(copy.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert shard.name in _message(copy)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}garbage"])
def test_garbage_shard(copy: Path, content: bytes) -> None:
    shard = sorted(copy.glob("*.safetensors"))[0]
    shard.write_bytes(content)
    _message(copy)


def test_missing_shard(copy: Path) -> None:
    shard = sorted(copy.glob("*.safetensors"))[2]
    shard.unlink()
    assert shard.name in _message(copy)


def test_index_that_leaves_the_directory(copy: Path) -> None:
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    assert "outside" in _message(copy)


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_hostile_index(copy: Path, content: str) -> None:
    (copy / "model.safetensors.index.json").write_text(content)
    _message(copy)


def _rewrite(copy: Path, name: str, value: np.ndarray | None) -> None:
    for shard in copy.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            del tensors[name]
            save_file(tensors if value is None else tensors | {name: value}, shard)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.10.eh_proj.weight"])
def test_missing_tensor(copy: Path, name: str) -> None:
    _rewrite(copy, name, None)
    assert name in _message(copy)


def test_wrong_shape(copy: Path) -> None:
    _rewrite(copy, "model.norm.weight", np.zeros(65, np.float32))
    assert "model.norm.weight has shape [65], the config says [64]" in _message(copy)


def test_wrong_dtype(copy: Path) -> None:
    _rewrite(copy, "model.norm.weight", np.zeros(64, np.int32))
    with pytest.raises(UnsupportedError, match=r"model\.norm\.weight has dtype I32"):
        Checkpoint.open(copy)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert "config.json" in _message(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw_config()))
    assert "safetensors" in _message(tmp_path)
