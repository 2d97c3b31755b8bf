"""How far to clip each group: the ratio that leaves the least error in the product, by its diagonal.

ModelOpt's `awq_clip` measures products of a few tokens. Here an error in a weight counts with the mean square
of its input: the diagonal of the same quadratic form over all tokens, and without any product. Where an input
was never seen every weight counts alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from step35_trt.quantize.calibration.quantisers import Groups
from step35_trt.quantize.folding import CLIP_RATIOS

if TYPE_CHECKING:
    from torch import Tensor

    from step35_trt.quantize.formats import Coding

TRIED = (0, 1, 2, 3, 4, 6, 8)  # indices into CLIP_RATIOS: 1 to 3/4


def clip_indices(weight: Tensor, coding: Coding, mean_square: Tensor | None) -> Tensor:
    """The best index into `CLIP_RATIOS` of each group.

    Args:
        weight: fp32 `[N, K]`, as it will be quantised.
        coding: An integer coding.
        mean_square: `[K]`, of the input; None counts all weights alike.

    Returns:
        uint8 `[N, K / block]`.
    """
    groups = Groups.of(weight, 4 if coding.kind == "int4" else 8, coding.block)
    importance = torch.ones(()) if mean_square is None else mean_square.reshape(-1, coding.block)
    best = torch.zeros(groups.values.shape[:-1], dtype=torch.uint8, device=weight.device)
    least = torch.full(best.shape, torch.inf, device=weight.device)
    for index in TRIED:
        error = groups.errors(float(CLIP_RATIOS[index])).square_().mul_(importance).sum(-1)
        best.masked_fill_(error < least, index)
        least = torch.minimum(least, error)
    return best
