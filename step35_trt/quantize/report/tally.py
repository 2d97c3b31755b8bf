"""Two models' next-token distributions compared while the vocabulary passes in slices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Tally:
    """Sums over the part of the vocabulary that has passed, fp64; the first axis is reference, other.

    With `a`, `b` the logits of a row: `largest [2, n]`, `total [2, n]` the sums of exp(logit - largest),
    `gap [n]` the sum of exp(a - largest a) (a - b), `top [2, n]` the most likely token, `target [2, n]` the
    logits of the tokens that follow.
    """

    targets: Tensor
    largest: Tensor
    total: Tensor
    gap: Tensor
    top: Tensor
    target: Tensor

    @classmethod
    def of(cls, targets: Tensor) -> Tally:
        """For rows whose next tokens are `targets [n]`."""
        n = len(targets)
        zeros = torch.zeros(2, n, dtype=torch.float64)
        infinite = torch.full_like(zeros, -torch.inf)
        return cls(targets, infinite, zeros, zeros[0].clone(), zeros.long(), infinite.clone())

    def add(self, rows: slice, first: int, reference: Tensor, other: Tensor) -> None:
        """Logits `[m, v]` of some rows for tokens from `first` on."""
        logits = torch.stack([reference, other]).double()
        best, index = logits.max(-1)
        before = self.largest[:, rows]
        largest = torch.maximum(before, best)
        self.top[:, rows] = torch.where(best > before, index + first, self.top[:, rows])
        shrink, parts = (before - largest).exp(), (logits - largest[..., None]).exp()
        self.total[:, rows] = self.total[:, rows] * shrink + parts.sum(-1)
        gap = (parts[0] * (logits[0] - logits[1])).sum(-1)
        self.gap[rows] = self.gap[rows] * shrink[0] + gap
        self.largest[:, rows] = largest
        place = self.targets[rows] - first
        inside = (place >= 0) & (place < logits.shape[-1])
        at = place.clamp(0, logits.shape[-1] - 1).expand(2, -1)[..., None]
        self.target[:, rows] = torch.where(inside, logits.gather(-1, at)[..., 0], self.target[:, rows])

    @property
    def kl(self) -> Tensor:
        """KL(reference || other) `[n]` in nats; rounding may leave it a little below zero."""
        reference, other = self._log_sums()
        kl: Tensor = self.gap / self.total[0] - reference + other
        return kl

    @property
    def loss(self) -> Tensor:
        """Nats of the tokens that follow, `[2, n]`."""
        return self._log_sums() - self.target

    def _log_sums(self) -> Tensor:
        return self.largest + self.total.log()
