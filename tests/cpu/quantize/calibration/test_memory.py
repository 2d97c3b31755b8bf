"""A layer larger than the address space that is left goes through."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from benchmarks.calibrate_layer import two_layers, write_slice

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.early

SCRIPT = """
import json, resource, sys
from pathlib import Path
import numpy as np
import modelopt.torch.quantization.tensor_quant
from step35_trt.checkpoint import Checkpoint
from step35_trt.quantize.calibration import calibrate
from step35_trt.quantize.recipe import Recipe

used = int(Path("/proc/self/status").read_text().split("VmSize:")[1].split()[0]) * 1024
budget = used + int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_AS, (budget, budget))
source = Checkpoint.open(Path(sys.argv[1]))
ids = np.random.default_rng(0).integers(0, source.config.vocab_size, (2, 32))
recipe = Recipe.load("int4-awq")
found = calibrate(source, recipe, ids, Path(sys.argv[2]), min_expert_tokens=2, max_host_memory=budget)
print(json.dumps({s.name: s.output_error for s in found.stages}))
"""


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
    arguments = [str(tmp_path / "checkpoint"), str(tmp_path / "work"), str(layer * 9 // 10)]
    # Each arena of the allocator reserves 64 MiB of addresses; how many there are is a matter of luck.
    alone = os.environ | {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False, env=alone
    )
    assert done.returncode == 0, done.stderr[-2000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert 0.01 < errors["layer-1"] < 0.3
