"""End to end: streamed figures are those of two sessions that hold the whole model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from step35_trt.checkpoint import Checkpoint
from step35_trt.evaluate import evaluate, log_softmax
from step35_trt.quantize.calibration import setup
from step35_trt.quantize.report import quality
from step35_trt.quantize.report.quality import measure_quality
from step35_trt.runtime.session_torch import TorchSession

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from step35_trt.quantize.calibration.sites import Stage
    from step35_trt.quantize.report.data import Quality
    from step35_trt.quantize.report.held_out import HeldOut
    from step35_trt.quantize.run import Job


def measure(
    before: Checkpoint,
    after: Checkpoint,
    held: HeldOut,
    work: Path,
    fp8: bool = False,
    tick: Callable[[str], None] = lambda _stage: None,
) -> Quality:
    return measure_quality(before, after, held, work, fp8_activations=fp8, tick=tick)


@pytest.mark.parametrize("chunk", [20, 2048])
def test_figures_are_those_of_whole_models(
    small: Checkpoint,
    held: HeldOut,
    converted: Callable[[str], tuple[Job, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
) -> None:
    monkeypatch.setattr(setup, "DEFAULT_CHUNK", chunk)
    monkeypatch.setattr(quality, "ROWS", 7)
    after = Checkpoint.open(converted("cpu-int4")[1])
    found = measure(small, after, held, tmp_path / "work")
    pairs = [[evaluate(TorchSession.of(c), row) for row in held.token_ids] for c in (small, after)]
    hidden = [np.concatenate([said.hidden for said in one]) for one in pairs]
    drift = np.linalg.norm(hidden[1] - hidden[0]) / np.linalg.norm(hidden[0])
    assert found.drift[f"layer-{small.config.num_hidden_layers - 1}"] == pytest.approx(drift, rel=1e-4)
    assert [part.part for part in found.agreements] == ["decoder", "mtp-0", "mtp-1", "mtp-2"]
    length = held.token_ids.shape[1]
    for index, part in enumerate(found.agreements):
        rows = length - 1 - index
        logs = [
            log_softmax(
                np.stack([said.mtp_logits[index - 1, :rows] if index else said.logits[:rows] for said in one])
            )
            for one in pairs
        ]
        kl = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1)
        assert part.tokens == kl.size
        assert part.mean_kl == pytest.approx(kl.mean(), rel=1e-3)
        assert part.max_kl == pytest.approx(kl.max(), rel=1e-3)
        tops = [log.argmax(-1) for log in logs]
        assert part.same_top == pytest.approx((tops[0] == tops[1]).mean())
        targets = held.token_ids[:, 1 + index :, None]
        losses = [-np.take_along_axis(log, targets, -1).mean() for log in logs]
        assert part.perplexity_before == pytest.approx(np.exp(losses[0]), rel=1e-4)
        assert part.perplexity_after == pytest.approx(np.exp(losses[1]), rel=1e-4)
        if index:
            decoder = [
                np.stack([said.logits.argmax(-1) for said in one])[:, index : index + rows] for one in pairs
            ]
            assert part.accepted_before == pytest.approx((tops[0] == decoder[0]).mean())
            assert part.accepted_after == pytest.approx((tops[1] == decoder[1]).mean())


def test_a_model_agrees_with_itself(small: Checkpoint, held: HeldOut, tmp_path: Path) -> None:
    found = measure(small, small, held, tmp_path / "work")
    assert set(found.drift.values()) == {0.0}
    for part in found.agreements:
        assert part.max_kl < 1e-12
        assert part.same_top == 1
        assert part.perplexity_before == part.perplexity_after
        assert part.accepted_before == part.accepted_after


def test_fp8_products_round_their_inputs(
    small: Checkpoint, held: HeldOut, converted: Callable[[str], tuple[Job, Path]], tmp_path: Path
) -> None:
    """Only where weights are FP8: rounding adds error to such a model and none to another."""
    fp8, int4 = (Checkpoint.open(converted(recipe)[1]) for recipe in ("fp8-official", "cpu-int4"))
    exact, rounded = (measure(small, fp8, held, tmp_path / "a", flag) for flag in (False, True))
    assert exact.drift["layer-2"] == rounded.drift["layer-2"]  # before the first routed experts
    assert exact.drift["layer-3"] < rounded.drift["layer-3"]
    plain, same = (measure(small, int4, held, tmp_path / "b", flag) for flag in (False, True))
    assert plain == same


class StopError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("stop", ["embedding", "layer-4", "layer-8", "mtp-1"])
def test_an_interrupted_evaluation_goes_on(
    small: Checkpoint,
    held: HeldOut,
    converted: Callable[[str], tuple[Job, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop: str,
) -> None:
    after = Checkpoint.open(converted("cpu-int4")[1])
    work, seen = tmp_path / "work", []

    def tick(stage: str) -> None:
        seen.append(stage)
        if stage == stop:
            raise StopError

    with pytest.raises(StopError):
        measure(small, after, held, work, tick=tick)
    run: list[str] = []
    real = quality._Side.forward

    def forward(side: quality._Side, stage: Stage) -> None:
        run.append(stage.name)
        real(side, stage)

    monkeypatch.setattr(quality._Side, "forward", forward)
    again = measure(small, after, held, work)
    assert not set(run) & set(seen)
    monkeypatch.setattr(quality._Side, "forward", real)
    assert again == measure(small, after, held, tmp_path / "other")
