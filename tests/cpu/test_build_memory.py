"""Building for a GPU streams: what is in memory does not grow with the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from step35_trt.checkpoint import Checkpoint
from step35_trt.engine import EngineSpec
from tests.cpu.test_sealed import quantised
from tests.process_memory import printed
from tests.synthetic import raw_config, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.early

# Compilers of kernels are processes of their own. What libraries take when they are first used is not the
# model's: a segment is compiled before the base is read.
MEMORY = """
import sys
from pathlib import Path
from step35_trt import build_tensorrt
from step35_trt.build import build
from step35_trt.build_tensorrt import compile_segment, gpu_contents
from step35_trt.checkpoint import Checkpoint
from step35_trt.engine import EngineSpec
from step35_trt.quantize.recipe import Recipe
from tests.gpu_kernels import uncompiled
from tests.process_memory import status

build_tensorrt.compile_kernels = uncompiled
spec, sources = EngineSpec.load(sys.argv[1]), [Path(name) for name in sys.argv[3:]]
if spec.target == "tensorrt-rtx":
    from step35_trt.deployment import Deployment
    from step35_trt.dialects.tensorrt_segment import Builder
    made = Deployment.of(Checkpoint.open(sources[0]).config, Recipe.load(spec.recipe), spec)
    compile_segment(made, next(iter(made.programs.segments)), Builder.rtx())
base = status("VmRSS")
for source in sources:
    build(source, Path(sys.argv[2]) / source.name, spec)
    print(status("VmHWM") - base)
"""


def test_memory_does_not_grow_with_layers(tmp_path: Path) -> None:
    """Six times the experts, the same peak."""
    spec, sources = EngineSpec.load("dgx-spark-int4"), []
    for layers in (4, 9):
        raw = raw_config(
            layers=layers,
            modules=1,
            heads=(16, 24),
            groups=2,
            vocab_size=96,
            hidden_size=512,
            moe_num_experts=16,
            moe_intermediate_size=768,
            share_expert_dim=256,
            intermediate_size=512,
        )
        plain = write_checkpoint(tmp_path / f"plain{layers}", raw)
        sources.append(quantised(plain, tmp_path / f"made{layers}", spec).directory)
    peaks = printed(MEMORY, spec.name, tmp_path / "bundles", *sources)
    size = Checkpoint.open(sources[1]).nbytes
    assert size > 60e6
    assert max(peaks) < 180e6
    assert peaks[1] < peaks[0] + 25e6  # five layers more are 47 MB
