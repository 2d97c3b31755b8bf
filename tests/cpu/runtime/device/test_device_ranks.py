"""Ranks on devices: the same packed numbers on all; steps are recorded with their exchanges, and replayed."""

from __future__ import annotations

import json
import signal
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from step35_trt import build_tensorrt
from step35_trt.build import build
from step35_trt.bundle import Bundle
from step35_trt.checkpoint import Checkpoint
from step35_trt.engine import EngineSpec
from step35_trt.errors import RankLostError, UnsupportedError, UsageError
from step35_trt.evaluate import evaluate
from step35_trt.quantize.recipe import Recipe
from step35_trt.runtime import gpu, load
from step35_trt.runtime.programs.ranks import Ranks
from step35_trt.runtime.session_cuda import open_cuda
from step35_trt.runtime.session_torch import TorchSession
from tests.cpu.quantize.test_convert import run
from tests.device_lives import CPU, PROMPT, TOKENS, die, lead, refuse, see_bundle
from tests.device_ranks import session_of
from tests.gpu_kernels import uncompiled
from tests.rank_stories import BOTH, TENSOR, answer, compare, told
from tests.ranks import places, run_ranks, shareable
from tests.synthetic import raw_config, write_checkpoint
from tests.tape import TapeRecorder

if TYPE_CHECKING:
    from pathlib import Path

    from step35_trt.sharing import Way

pytestmark = pytest.mark.early


@pytest.fixture(scope="module")
def divisible(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shareable(tmp_path_factory.mktemp("shared") / "checkpoint")


@pytest.fixture(scope="module")
def alone(divisible: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a single device answers, which is what the definition does."""
    out = tmp_path_factory.mktemp("alone")
    answer(session_of(divisible, CPU, TapeRecorder()), PROMPT, TOKENS, out / "device")
    answer(TorchSession.of(Checkpoint.open(divisible)), PROMPT, TOKENS, out / "definition")
    compare(out / "definition", out / "device", TOKENS)
    return out / "device"


@pytest.mark.parametrize("ways", [TENSOR, BOTH])
def test_ranks_say_what_one_says(divisible: Path, alone: Path, tmp_path: Path, ways: dict[str, Way]) -> None:
    ranks = 2
    assert run_ranks(ranks, lead, divisible, ranks, ways, tmp_path) == [0] * ranks
    compare(alone, tmp_path, TOKENS)
    counts = [json.loads((tmp_path / f"recorded-{rank}.json").read_text()) for rank in range(ranks)]
    assert counts == [counts[0]] * ranks
    assert min(counts[0]) > 5


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and its bundle for two GPUs: heads shared out, int4 experts dealt out."""
    root, recipe = tmp_path_factory.mktemp("deployed"), Recipe.load("int4-experts-fp8")
    widths = {"hidden_size": 128, "moe_intermediate_size": 128, "moe_num_experts": 8, "moe_top_k": 2}
    raw = raw_config(layers=3, modules=1, heads=(16, 24), groups=2, vocab_size=96, **widths)
    plain = write_checkpoint(root / "plain", raw)
    source = run(plain, root / "checkpoint", recipe.model_copy(update={"calibration": None}))
    limits = {"max_tokens": 256, "prefill_chunk": 32, "max_sequences": 2}
    spec = EngineSpec.load("h200x2-fp8").model_copy(update={"recipe": recipe.name, **limits})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_tensorrt, "compile_kernels", uncompiled)
        build(source.directory, root / "bundle", spec)
    return source.directory, root / "bundle"


def test_a_bundle_s_ranks_run_its_weights(deployed: tuple[Path, Path], tmp_path: Path) -> None:
    """Against fp32 arithmetic on the same codes, as near as bf16 comes to it."""
    checkpoint, bundle = deployed
    ids = np.random.default_rng(0).integers(0, 96, 40)
    assert run_ranks(2, see_bundle, bundle, ids.tolist(), tmp_path) == [0, 0]
    want, got = evaluate(TorchSession.of(Checkpoint.open(checkpoint)), ids), np.load(tmp_path / "seen.npz")
    known = ~np.isnan(want.mtp_logits)
    for one, other in ((got["logits"], want.logits), (got["mtp"][known], want.mtp_logits[known])):
        error = np.abs(one - other) / np.abs(other).max()
        assert 0 < np.median(error) < 0.01


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("capabilities", "sentence"),
    [
        (["9.0"], "is shared by 2 GPUs, and this machine has 1 of the kind"),
        ([], "and this machine has no NVIDIA GPU"),
    ],
)
def test_too_few_gpus(
    deployed: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    rank: int,
    capabilities: list[str],
    sentence: str,
) -> None:
    for name, value in places(2)[rank].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(gpu, "capabilities", lambda: capabilities)
    finished = Bundle.open(deployed[1])
    finished = finished.model_copy(
        update={"manifest": finished.manifest.model_copy(update={"unfinished": ()})}
    )
    with pytest.raises(SystemExit if rank else UnsupportedError) as caught:
        load.open_session(finished)
    if rank:
        assert caught.value.code == UnsupportedError.exit_code
    else:
        assert sentence in caught.value.message


def test_as_many_processes_as_gpus(deployed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(gpu, "check", lambda _: None)
    with pytest.raises(UsageError, match="is for 2 processes, and 1 process started it"):
        load.open_session(Bundle.open(deployed[1]))


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_takes_its_gpu(
    deployed: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    for name, value in places(2)[rank].items():
        monkeypatch.setenv(name, value)
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)

    def join(device: torch.device) -> None:
        raise RankLostError(f"{device} joins")

    monkeypatch.setattr(Ranks, "join", join)
    with pytest.raises(RankLostError, match=f"cuda:{rank} joins"):
        open_cuda(Bundle.open(deployed[1]))
    assert chosen == [torch.device("cuda", rank)]


def test_what_does_not_fit_ends_nobody(divisible: Path, tmp_path: Path) -> None:
    assert run_ranks(2, refuse, divisible, TENSOR, tmp_path) == [0, 0]
    alone = TorchSession.of(Checkpoint.open(divisible))
    assert json.loads((tmp_path / "answer.json").read_text()) == told(alone, [7, 8, 9], 0, TOKENS)


@pytest.mark.parametrize(("ranks", "victim"), [(2, 0), (4, 2)])
def test_a_killed_rank_ends_the_others(divisible: Path, tmp_path: Path, ranks: int, victim: int) -> None:
    codes = run_ranks(ranks, die, divisible, ranks, victim, tmp_path)
    ended = time.monotonic()
    killed = float((tmp_path / "killed").read_text())
    assert ended - killed < 10
    assert [code for rank, code in enumerate(codes) if rank != victim] == [1] * (ranks - 1)
    assert codes[victim] == -signal.SIGKILL
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(ranks)]
    sentence = f"error: rank {victim} of {ranks} has ended, and the others end with it"
    assert [text.splitlines()[0] for text in said if text] == [sentence]
