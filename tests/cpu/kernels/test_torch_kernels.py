"""The torch dialect with its plugins as kernels, in Triton's interpreter, against its own definition.

Whether kernels are interpreted is decided where Triton is imported, so these run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from step35_trt.errors import UnsupportedError
from tests.synthetic import raw_config, write_checkpoint

SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from step35_trt.checkpoint import Checkpoint
from step35_trt.dialects.torch_kernels import TritonKernels
from step35_trt.kernels.targets import TARGETS
from step35_trt.runtime.session_torch import TorchSession

plain = TorchSession.of(Checkpoint.open(Path(sys.argv[1])))
kernels = replace(plain, kernels=TritonKernels(plain.weights, TARGETS["sm_90"]))
ids = np.random.default_rng(1).integers(0, 97, 26)
arrays = {}
for name, session in (("plain", plain), ("kernels", kernels)):
    sequence = session.open()
    found = [sequence.decode(ids[:20], np.arange(20))]
    sequence.decode(np.array([3, 5, 7]), np.arange(0))  # drafts that are rejected
    sequence.truncate(20)
    found.append(sequence.decode(ids[20:23], np.arange(3)))
    found.append(sequence.decode(ids[23:24], np.arange(1)))
    arrays[name] = np.concatenate([step.hidden for step in found])
    arrays[f"{name}_draft"] = sequence.draft(0, ids[1:4], found[0].hidden[:3], np.arange(3)).hidden
np.savez(sys.argv[2], **arrays)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    root = tmp_path_factory.mktemp("kernels")
    # One layer of each kind: full attention with dense products, a window with experts.
    raw = raw_config(layers=2, modules=1, moe_layers_enum="1")
    directory = write_checkpoint(root / "checkpoint", raw)
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(directory), str(root / "out.npz")]
    subprocess.run(command, env=environment, check=True, cwd=Path(__file__).parents[3])
    with np.load(root / "out.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("suffix", ["", "_draft"])
def test_kernels_compute_what_the_definition_does(found: dict[str, np.ndarray], suffix: str) -> None:
    plain, kernels = found[f"plain{suffix}"], found[f"kernels{suffix}"]
    error = np.abs(plain - kernels).max() / np.abs(plain).max()
    assert 0 < error < 0.02  # both round to bf16, in different places


def test_a_device_that_is_not_here_is_refused() -> None:
    import torch

    from step35_trt.dialects.torch_kernels import present_target

    with pytest.raises(UnsupportedError, match="no CUDA device"):
        present_target(torch.device("cpu"))
