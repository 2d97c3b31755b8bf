"""The search for tactics, on times that a formula gives."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from step35_trt import cli
from step35_trt.dialects import torch_kernels
from step35_trt.kernels import gpu_bench, tactics, tuning
from step35_trt.kernels.catalogue import PLUGINS
from step35_trt.kernels.targets import TARGETS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

FIRST = tactics.Tactic(
    kernel="up", when={"tokens": (0, 16)}, constants={"ROWS": 16, "TILE": 16}, num_warps=4, num_stages=2
)
SECOND = tactics.Tactic(
    kernel="down", when={"tokens": (0, 16)}, constants={"TILE": 16}, num_warps=4, num_stages=2
)
OTHER = tactics.Tactic(
    kernel="up", when={"tokens": (17, 99)}, constants={"ROWS": 16}, num_warps=4, num_stages=2
)


@dataclass
class Formula:
    """Fastest at 64 rows, 8 warps, tiles of 32 which both kernels have to agree on."""

    problems: Sequence[Mapping[str, int]] = ({"tokens": 1}, {"tokens": 8})
    refused: int = 0
    asked: list[tuple[int, tuple[tactics.Tactic, ...]]] = field(default_factory=list)

    def compiles(self, entries: tuple[tactics.Tactic, ...], kernel: str) -> bool:
        up = next(e for e in entries if e.kernel == kernel)
        if up.num_stages > 4:
            self.refused += 1
        return up.num_stages <= 4

    def seconds(self, workload: int, entries: tuple[tactics.Tactic, ...]) -> float:
        self.asked.append((workload, entries))
        up, down = entries[0], entries[1]
        assert up.num_stages <= 4
        if up.constants["TILE"] != down.constants["TILE"]:
            return math.inf
        distances = [
            math.log2(up.constants["ROWS"] / 64),
            math.log2(up.constants["TILE"] / 32),
            math.log2(up.num_warps / 8),
        ]
        return 1e-5 * (1 + sum(abs(d) for d in distances)) / up.num_stages


def test_the_fastest_is_found_and_the_rest_is_left_alone() -> None:
    bench, seen = Formula(), []
    found = tuning.tune((FIRST, SECOND, OTHER), bench, lambda done, total, name: seen.append((done, total)))
    assert dict(found[0].constants) == {"ROWS": 64, "TILE": 32}
    assert found[1].constants["TILE"] == 32
    assert (found[0].num_warps, found[0].num_stages) == (8, 4)
    assert found[2] == OTHER  # no workload chooses it
    assert bench.refused
    assert seen[0] == (1, 9)
    assert [e.when for e in found] == [FIRST.when, SECOND.when, OTHER.when]


def test_noise_changes_nothing() -> None:
    @dataclass
    class Flat(Formula):
        def seconds(self, workload: int, entries: tuple[tactics.Tactic, ...]) -> float:
            return 1e-5 * (1 - 0.01 * (len(self.asked) % 2))

    assert tuning.tune((FIRST, SECOND), Flat()) == (FIRST, SECOND)


def test_what_is_written_can_be_read() -> None:
    found = tactics.Tactics(measured="a card, today", entries=(FIRST, OTHER))
    assert tactics.Tactics.model_validate_json(tuning.text(found)) == found


@pytest.mark.parametrize("plugin", PLUGINS)
@pytest.mark.parametrize("name", TARGETS)
def test_every_target_has_a_point_to_start_from(plugin: str, name: str) -> None:
    assert tactics.load(plugin, TARGETS[name].capability).entries


def test_what_fails_at_first_is_mended() -> None:
    wide = SECOND.model_copy(update={"constants": {"TILE": 32}})  # no workload runs: the tiles differ
    found = tuning.tune((FIRST, wide), Formula())
    assert {entry.constants["TILE"] for entry in found} == {32}


def test_an_interrupted_search_has_kept_what_it_found() -> None:
    kept: list[tuple[tactics.Tactic, ...]] = []

    @dataclass
    class Stopped(Formula):
        def seconds(self, workload: int, entries: tuple[tactics.Tactic, ...]) -> float:
            if len(kept) == 2:
                raise KeyboardInterrupt
            return super().seconds(workload, entries)

    with pytest.raises(KeyboardInterrupt):
        tuning.tune((FIRST, SECOND), Stopped(), keep=kept.append)
    whole = Formula()
    first, second = (max(whole.seconds(n, entries) for n in (0, 1)) for entries in kept)
    assert second < first < whole.seconds(0, (FIRST, SECOND))


def test_the_command_writes_what_an_interrupted_search_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = tactics.Tactics(measured="a card, today, unfinished", entries=(FIRST, OTHER))

    def stopped(name, target, device, progress, keep):  # type: ignore[no-untyped-def]
        keep(partial)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch_kernels, "present_target", lambda device: TARGETS["sm_90"])
    monkeypatch.setattr(gpu_bench, "tuned", stopped)
    arguments = ["tune", "--plugin", "sparse_moe", "-o", str(tmp_path / "x.json")]
    monkeypatch.setattr(sys, "argv", ["step35-trt", *arguments])
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        cli.main()
    assert tactics.Tactics.model_validate_json((tmp_path / "x.json").read_text()) == partial
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ([], 3, "no CUDA device"),
        (["--plugin", "nothing"], 2, "no plugin nothing"),
        (["-o", "x.json"], 2, "one plugin"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    arguments: list[str],
    code: int,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["step35-trt", "tune", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == code
    assert sentence in capsys.readouterr().err
