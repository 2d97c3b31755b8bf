"""The run as a whole: the dialect's states, what is reported, who falls back, kills and refusals."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from step35_trt.checkpoint import Checkpoint
from step35_trt.dialects.checkpoint_weights import CheckpointWeights
from step35_trt.errors import DoesNotFitError, UsageError
from step35_trt.quantize.calibration import Calibration, calibrate
from step35_trt.quantize.calibration.observe import Routing
from step35_trt.quantize.calibration.quantisers import fake_quantise
from step35_trt.quantize.calibration.setup import chunk_tokens
from step35_trt.quantize.calibration.spool import Spool
from step35_trt.quantize.folding import Folded
from step35_trt.quantize.recipe import Recipe
from step35_trt.runtime.session_torch import TorchSession

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def small(checkpoints: dict[str, Path]) -> Checkpoint:
    return Checkpoint.open(checkpoints["small-window"])


@pytest.fixture(scope="module")
def least(
    small: Checkpoint, token_ids: np.ndarray, int4: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> int:
    """Tokens that some experts reach and some do not."""
    found = calibrate(small, int4, token_ids, tmp_path_factory.mktemp("least"), method="none")
    counts = sorted(n for stage in found.stages if stage.coverage for n in stage.coverage.tokens)
    assert counts[0] < counts[-1]
    return counts[len(counts) // 4] + 1


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def found(small: Checkpoint, token_ids: np.ndarray, int4: Recipe, least: int, work: Path) -> Calibration:
    return calibrate(small, int4, token_ids, work, min_expert_tokens=least)


def test_spooled_states_are_the_dialects(
    small: Checkpoint, token_ids: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streamed, deferred and chunked, the states are what a session computes; in fp32 nothing is lost."""
    monkeypatch.setattr(Spool, "drop", lambda _self, _index: None)
    monkeypatch.setattr("step35_trt.quantize.calibration.setup.DEFAULT_CHUNK", 30)  # one sequence at a time
    found = calibrate(small, Recipe.load("fp32"), token_ids, tmp_path)
    count, length = token_ids.shape
    config = small.config
    spool = Spool(tmp_path, token_ids.size, config.hidden_size)
    session = TorchSession(config, CheckpointWeights(small))
    for row, ids in enumerate(token_ids):
        sequence = session.open()
        hidden = sequence.decode(ids, np.arange(1)).hidden
        got = spool.read(config.num_hidden_layers).view(count, length, -1)[row].numpy()
        np.testing.assert_allclose(got, hidden, rtol=1e-4, atol=1e-4)
        for k in range(config.num_nextn_predict_layers):
            rows = length - 1 - k
            hidden = sequence.draft(k, ids[1 + k :], hidden[:rows], np.arange(1)).hidden
            got = spool.read(config.num_hidden_layers + k + 1).view(count, length, -1)[row, :rows].numpy()
            np.testing.assert_allclose(got, hidden, rtol=1e-4, atol=1e-4)
    for stage in found.stages:
        assert (stage.output_error or 0) < 1e-6, stage.name
        assert all(m.weight_error == 0 for m in stage.matrices)
        assert stage.routing is None or stage.routing.flips == 0


def test_everything_is_reported(small: Checkpoint, token_ids: np.ndarray, found: Calibration) -> None:
    config = small.config
    names = [stage.name for stage in found.stages]
    assert names == ["embedding", *(f"layer-{i}" for i in range(9)), "head", "mtp-0", "mtp-1", "mtp-2"]
    matrices = {m.name: m for stage in found.stages for m in stage.matrices}
    assert set(matrices) == {n for n in small.tensors if len(small.shape(n)) > 1}
    for name, matrix in matrices.items():
        assert matrix.bytes_before == small.tensors[name].nbytes
        if matrix.coding.startswith("int4"):
            assert 0.01 < matrix.weight_error < 0.3, name
            assert matrix.output_error is not None
            assert matrix.bytes_after < 0.32 * matrix.bytes_before
    experts = matrices["model.layers.5.moe.up_proj.weight"]
    assert len(experts.experts) == config.moe_num_experts
    for stage in found.stages:
        blocks = stage.name.startswith(("layer", "mtp"))
        assert (stage.output_error is not None) == blocks
        assert not blocks or 0.01 < stage.output_error < 0.5  # type: ignore[operator]
        if stage.coverage:
            assert sum(stage.coverage.tokens) == token_ids.size * config.moe_top_k
            assert stage.routing is not None
            assert stage.routing.beyond_rounding <= stage.routing.flips <= stage.routing.tokens
            assert stage.routing.tokens == token_ids.size


def test_calibrated_is_nearer_than_rounded(
    small: Checkpoint, token_ids: np.ndarray, int4: Recipe, found: Calibration, tmp_path: Path
) -> None:
    plain = calibrate(small, int4, token_ids, tmp_path, method="none")
    assert not plain.folding.scalings
    pairs = [
        (a.output_error, b.output_error)
        for a, b in zip(found.stages, plain.stages, strict=True)
        if a.output_error is not None and b.output_error is not None
    ]
    ratios = [a / b for a, b in pairs]
    assert np.mean(ratios) < 0.97


def test_uncovered_experts_fall_back_to_their_weights(
    small: Checkpoint, least: int, found: Calibration
) -> None:
    stage = next(stage for stage in found.stages if stage.name == "layer-4")  # no clamp
    coverage = stage.coverage
    assert coverage is not None
    assert coverage.least == least
    assert coverage.fallback == tuple(e for e, n in enumerate(coverage.tokens) if n < least)
    assert 0 < len(coverage.fallback) < len(coverage.tokens)
    down, up = (f"model.layers.4.moe.{part}_proj.weight" for part in ("down", "up"))
    scaling = found.folding.scalings[down]
    assert scaling.columns is not None
    assert scaling.clip is not None
    own = {s.expert: s.alpha for s in stage.scales if s.expert is not None}
    assert set(own) == set(range(len(coverage.tokens))) - set(coverage.fallback)
    folded = Folded(small, found.folding)
    by_weights = []
    for expert in range(len(coverage.tokens)):
        weight = torch.from_numpy(folded.read(down, expert))
        coding = Recipe.load("int4-awq").coding(down, small.shape(down))
        assert coding is not None
        clip = torch.from_numpy(scaling.clip[expert])
        error = (fake_quantise(weight, coding, clip) - weight).square().sum()
        plain = (fake_quantise(weight, coding) - weight).square().sum()
        if expert in coverage.fallback:
            assert (scaling.columns[expert] == 1).all()
            assert (found.folding.scalings[up].rows[expert] == 1).all()  # type: ignore[index]
            by_weights.append(bool(error <= plain))
        else:
            assert (scaling.columns[expert] != 1).any() == (own[expert] is not None)
    assert all(by_weights)


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


def test_killed_runs_end_in_the_same_bytes(
    small: Checkpoint,
    token_ids: np.ndarray,
    int4: Recipe,
    least: int,
    found: Calibration,
    work: Path,
    tmp_path: Path,
) -> None:
    """kill -9 after a random number of steps, again and again until a run gets through."""
    rng = np.random.default_rng(3)
    deaths = 0
    for _ in range(60):
        left = int(rng.integers(20, 160))
        child = os.fork()
        if child == 0:  # torch runs on one thread here, so a fork can go on
            steps = 0

            def progress(_done: int, _total: int, _name: str) -> None:
                nonlocal steps
                steps += 1
                if steps == left:  # noqa: B023 - this fork's own
                    os.kill(os.getpid(), signal.SIGKILL)

            try:
                calibrate(small, int4, token_ids, tmp_path, min_expert_tokens=least, progress=progress)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            break
        deaths += 1
    assert deaths > 2
    assert contents(tmp_path) == contents(work)
    assert (
        found.folding.digest()
        == calibrate(small, int4, token_ids, tmp_path, min_expert_tokens=least).folding.digest()
    )


def test_another_calibration_starts_afresh(
    small: Checkpoint, token_ids: np.ndarray, int4: Recipe, tmp_path: Path
) -> None:
    first = calibrate(small, int4, token_ids[:2], tmp_path, method="none")
    mine = tmp_path / "notes.txt"
    mine.write_text("kept")
    second = calibrate(small, int4, token_ids[2:], tmp_path, method="none")
    assert first.stages != second.stages
    assert mine.exists()


def test_a_finished_calibration_is_read(
    small: Checkpoint, token_ids: np.ndarray, int4: Recipe, least: int, found: Calibration, work: Path
) -> None:
    before = contents(work)
    again = calibrate(small, int4, token_ids, work, min_expert_tokens=least)
    assert again.stages == found.stages
    assert contents(work) == before


def test_refusals_are_sentences(
    small: Checkpoint, token_ids: np.ndarray, int4: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(DoesNotFitError, match=r"needs .* GiB and .* GiB are allowed"):
        calibrate(small, int4, token_ids, tmp_path, max_host_memory=1 << 20)
    with pytest.raises(UsageError, match="vocabulary"):
        calibrate(small, int4, token_ids + 97, tmp_path)
    with pytest.raises(UsageError, match="too short"):
        calibrate(small, int4, token_ids[:, :4], tmp_path)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        calibrate(small, int4, token_ids, blocked)


def test_a_full_disk_is_a_sentence_and_loses_nothing(
    small: Checkpoint, token_ids: np.ndarray, int4: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def full(handle: int, offset: int, size: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise OSError(28, "No space left on device")
        os.ftruncate(handle, offset + size)

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(DoesNotFitError, match="no room left"):
            calibrate(small, int4, token_ids, tmp_path, method="none")
    finished = set(tmp_path.glob("*.json"))
    assert finished
    times = {file: file.stat().st_mtime_ns for file in finished}
    calibrate(small, int4, token_ids, tmp_path, method="none")
    assert {file: file.stat().st_mtime_ns for file in finished} == times


def test_memory_decides_how_many_tokens_pass(small: Checkpoint) -> None:
    plenty = chunk_tokens(small.config, 100, 16, None)
    assert plenty >= 1024
    sizes = []
    for budget in range(1 << 20, 64 << 30, 8 << 20):
        try:
            sizes.append(chunk_tokens(small.config, 100, 16, budget))
        except DoesNotFitError:
            assert not sizes
        if sizes and sizes[-1] == plenty:
            break
    assert sizes[0] < plenty
    assert sizes == sorted(sizes)


def test_flips_that_rounding_explains_do_not_count() -> None:
    def routing(chosen: list[list[int]]) -> Routing:
        rows = len(chosen)
        return Routing(
            torch.tensor(chosen),
            torch.ones(rows, 2),
            torch.tensor([0.5, 0.01, 0.5])[:rows],
            torch.tensor([0.1, 0.1, 0.1])[:rows],
        )

    first = routing([[0, 1], [0, 1], [2, 3]])
    assert first.flips(routing([[0, 2], [0, 2], [2, 3]])) == (2, 1)
    assert first.flips(first) == (0, 0)
