"""Products with FP8 weights see rounded inputs, in routed experts as anywhere else."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn import functional

from step35_trt.dialects.torch import SequenceBatch
from step35_trt.quantize.calibration.quantisers import quantise_activations
from step35_trt.quantize.formats import Coding
from step35_trt.quantize.report.replay import ReplayOps, Rounding

if TYPE_CHECKING:
    from torch import Tensor

KEPT, ROUNDED = Coding("bf16"), Coding("fp8-rows")


@dataclass(frozen=True)
class Drawn:
    """`Weights` by name."""

    values: dict[str, Tensor]

    def tensor(self, name: str) -> Tensor:
        return self.values[name]

    def expert(self, name: str, index: int) -> Tensor:
        return self.values[name][index]


@pytest.mark.parametrize("codings", [(KEPT, KEPT), (KEPT, ROUNDED), (ROUNDED, KEPT), (ROUNDED, ROUNDED)])
@pytest.mark.parametrize("fp8", [False, True])
def test_which_inputs_are_rounded(codings: tuple[Coding, Coding], fp8: bool) -> None:
    torch.manual_seed(0)
    first, last = codings
    names = ("e.gate_proj.weight", "e.up_proj.weight", "e.down_proj.weight")
    shapes = ((3, 8, 16), (3, 8, 16), (3, 16, 8))
    weights = {name: torch.randn(shape) for name, shape in zip(names, shapes, strict=True)}
    weights["dense"] = torch.randn(5, 16)
    kinds = dict(zip((*names, "dense"), (first, first, last, last), strict=True))
    rounding = Rounding(SimpleNamespace(codings=kinds), fp8)  # type: ignore[arg-type]
    ops = ReplayOps(Drawn(weights), SequenceBatch.fresh(4), rounding=rounding)
    x, chosen = torch.randn(4, 16), torch.tensor([2, 0, 1, 2])
    scores = functional.one_hot(chosen, 3).float()

    def seen(value: Tensor, coding: Coding) -> Tensor:
        return quantise_activations(value) if fp8 and coding is ROUNDED else value

    dense = seen(x, last) @ weights["dense"].T
    torch.testing.assert_close(ops.linear(x, "dense"), dense)
    expected = []
    for row, expert in zip(seen(x, first), chosen.tolist(), strict=True):
        gate, up, down = (weights[name][expert] for name in names)
        hidden = functional.silu(gate @ row) * (up @ row)
        expected.append(down @ seen(hidden[None], last)[0])
    found = ops.sparse_moe(x, scores, scores, "e", 1, 1.0, 0.0)
    torch.testing.assert_close(found, torch.stack(expected))
