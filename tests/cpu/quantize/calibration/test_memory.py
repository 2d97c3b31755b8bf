"""A layer larger than the address space that is left goes through."""

from __future__ import annotations

import ctypes
import json
import resource
from importlib import import_module
from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks.calibrate_layer import two_layers, write_slice
from step35_trt.checkpoint import Checkpoint
from step35_trt.quantize.calibration import calibrate
from step35_trt.quantize.recipe import Recipe
from tests.cpu.test_build import in_child
from tests.process_memory import status

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.early

M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of glibc's mallopt


def limited(checkpoint: Path, work: Path, more: int) -> None:
    """Calibrate where so many bytes more than now may be mapped; what is found goes to `work`."""
    allocator = ctypes.CDLL(None)
    allocator.mallopt(M_ARENA_MAX, 1)  # each reserves 64 MiB; how many there would be is a matter of luck
    allocator.mallopt(M_MMAP_THRESHOLD, 1 << 17)  # or large tensors go where older ones were
    budget = status("VmSize") + more
    resource.setrlimit(resource.RLIMIT_AS, (budget, budget))
    source = Checkpoint.open(checkpoint)
    ids = np.random.default_rng(0).integers(0, source.config.vocab_size, (2, 8))
    recipe = Recipe.load("int4-awq")
    found = calibrate(source, recipe, ids, work, min_expert_tokens=2, max_host_memory=budget)
    (work / "errors.json").write_text(json.dumps({s.name: s.output_error for s in found.stages}))


def test_the_weights_of_a_layer_need_not_fit(tmp_path: Path) -> None:
    """Nine tenths of its bytes may be mapped beyond the libraries; three quarters of those are used."""
    raw = two_layers(
        hidden_size=1024,
        intermediate_size=512,
        num_attention_heads=8,
        num_attention_groups=2,
        head_dim=64,
        attention_other_setting={
            "attention_type": "sliding_attention",
            "num_attention_heads": 16,
            "num_attention_groups": 2,
            "head_dim": 64,
        },
        moe_num_experts=64,
        moe_intermediate_size=256,
        share_expert_dim=256,
        vocab_size=256,
    )
    write_slice(tmp_path / "checkpoint", raw, most=50_000_000)
    layer = sum(file.stat().st_size for file in (tmp_path / "checkpoint").glob("*.safetensors"))
    assert layer > 100e6  # nearly all of it the second layer's experts
    import_module("modelopt.torch.quantization.tensor_quant")  # its libraries are not the layer's
    in_child(lambda: limited(tmp_path / "checkpoint", tmp_path / "work", layer * 9 // 10))
    errors = json.loads((tmp_path / "work" / "errors.json").read_text())
    assert 0.01 < errors["layer-1"] < 0.3
