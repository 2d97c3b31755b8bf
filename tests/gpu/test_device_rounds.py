"""On a GPU: rounds run at once give nano's tokens, and the likeliest token is the host's."""

from __future__ import annotations

import os

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a CUDA device and compiled kernels", allow_module_level=True)

from benchmarks.gpu_sources import CheckpointSource  # noqa: E402 - after the skip
from step35_trt.checkpoint import Checkpoint, expected_tensors  # noqa: E402
from step35_trt.lower import ModelPrograms  # noqa: E402
from step35_trt.quantize.recipe import Recipe  # noqa: E402
from step35_trt.resources import NANO  # noqa: E402
from step35_trt.runtime.cache.cache_extent import Extent  # noqa: E402
from step35_trt.runtime.decoding.generate import generate  # noqa: E402
from step35_trt.runtime.decoding.generation_stats import GenerationStats  # noqa: E402
from step35_trt.runtime.decoding.sampling import SamplingParams, greedy  # noqa: E402
from step35_trt.runtime.device.round_runner import likeliest  # noqa: E402
from step35_trt.runtime.session_cuda import device_runner, device_weights  # noqa: E402
from step35_trt.runtime.session_program import ProgramSession  # noqa: E402
from step35_trt.weight_forms import Forms  # noqa: E402

DEVICE = torch.device("cuda", 0)


def test_rounds_say_what_steps_say() -> None:
    """In fp32, where best tokens lie further apart than orders of additions."""
    checkpoint = Checkpoint.open(NANO)
    forms = Forms.of(Recipe.load("fp32"), expected_tensors(checkpoint.config))
    made = ModelPrograms.of(checkpoint.config, forms)
    weights = device_weights(made, CheckpointSource(checkpoint, forms, DEVICE), DEVICE)
    answers = []
    for whole in (True, False):
        runner = device_runner(checkpoint.config, made, weights, Extent(1, 512, 64), torch.float32)
        if not whole:
            runner.rounds = None  # type: ignore[assignment]
        session = ProgramSession(checkpoint.config, runner, 512, 64, 1)
        assert (session.rounds is not None) == whole
        for drafts in range(4):
            stats = GenerationStats()
            parts = generate(
                session,
                list(range(100, 180)),
                SamplingParams(),
                max_tokens=100,
                draft_tokens=drafts,
                stats=stats,
            )
            answers.append([token for part in parts for token in part])
            assert drafts == 0 or stats.accepted[0] > 0
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_the_likeliest_is_the_first_of_the_largest(levels: int) -> None:
    logits = torch.randint(-levels, levels + 1, (32, 128896), device=DEVICE).bfloat16()
    np.testing.assert_array_equal(likeliest(logits).cpu().numpy(), greedy(logits.float().cpu().numpy()))
    logits[3, 77], logits[4, 5] = torch.nan, torch.inf
    assert likeliest(logits)[[3, 4]].tolist() == [-1, -1]
