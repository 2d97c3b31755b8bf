"""The torch dialect that watches: what matrices are multiplied with, and which experts tokens choose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from step35_trt.dialects.torch import TorchOps

if TYPE_CHECKING:
    from torch import Tensor

    from step35_trt.dialects.torch import Weights
    from step35_trt.quantize.folding import TensorSource

BF16_ROUNDING = 2.0**-8  # unit roundoff of eight significant bits
ROUNDING_SIGMAS = 3.0  # in units of that bound; rounding errors are uniform, so five of their deviations


@dataclass(frozen=True)
class StreamedWeights:
    """`Weights` that keeps nothing: a matrix lives as long as its product."""

    source: TensorSource
    device: torch.device

    def tensor(self, name: str) -> Tensor:
        """See `Weights`."""
        return torch.from_numpy(self.source.read(name)).to(self.device)

    def expert(self, name: str, index: int) -> Tensor:
        """See `Weights`."""
        return torch.from_numpy(self.source.read(name, index)).to(self.device)


@dataclass
class Inputs:
    """What is kept of a matrix's inputs `[n, K]`.

    `sample` has every `stride`-th token; the sums run over all.
    """

    stride: int
    tokens: int = 0
    sum_abs: Tensor | float = 0.0
    sum_squares: Tensor | float = 0.0
    _sample: list[Tensor] = field(default_factory=list)

    def see(self, x: Tensor) -> None:
        """Take in the next tokens."""
        wide = x.float()
        self._sample.append(wide[-self.tokens % self.stride :: self.stride].clone())
        self.tokens += len(x)
        self.sum_abs = self.sum_abs + wide.abs().sum(0)
        self.sum_squares = self.sum_squares + wide.square().sum(0)

    @property
    def sample(self) -> Tensor:
        """fp32 `[about n / stride, K]`."""
        return torch.cat(self._sample)

    @property
    def mean_abs(self) -> Tensor:
        """fp32 `[K]`."""
        return torch.as_tensor(self.sum_abs) / max(1, self.tokens)

    @property
    def mean_square(self) -> Tensor:
        """fp32 `[K]`."""
        return torch.as_tensor(self.sum_squares) / max(1, self.tokens)


@dataclass
class Routing:
    """What a router chose for `tokens` tokens; rows follow the tokens.

    Attributes:
        chosen: `[n, k]` experts, sorted.
        mix: `[n, k]` their weights, fp32, the model's scale included.
        margin: `[n]` how far the last chosen score lies above the first one left out.
        rounding: `[n]` how far those two scores move at most when the router's input is rounded to bf16 once.
    """

    chosen: Tensor
    mix: Tensor
    margin: Tensor
    rounding: Tensor

    @classmethod
    def joined(cls, parts: list[Routing]) -> Routing:
        """Of consecutive tokens."""
        return cls(*(torch.cat([getattr(p, x) for p in parts]) for x in cls.__dataclass_fields__))

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Tokens that chose an expert `[m]`, and its weights for them `[m, 1]`."""
        token, slot = (self.chosen == expert).nonzero(as_tuple=True)
        return token, self.mix[token, slot, None]

    def counts(self, experts: int) -> list[int]:
        """Tokens of each expert."""
        return torch.bincount(self.chosen.flatten(), minlength=experts).tolist()

    def flips(self, other: Routing) -> tuple[int, int]:
        """Tokens for which `other` chose another set; those among them that rounding does not explain."""
        differ = (self.chosen != other.chosen).any(-1)
        return int(differ.sum()), int((differ & (self.margin > self.rounding)).sum())


@dataclass(frozen=True)
class WatchingOps(TorchOps):
    """The torch dialect over some sequences of a stage.

    A vocabulary head is watched and not computed. Routed experts are left out (`sparse_moe` is zero): their
    inputs go to `routed`, because one expert at a time is run later, over the tokens of all sequences.

    Attributes:
        watched: By the name of the matrix whose inputs are kept.
        routings: One entry for each call of `sparse_moe`.
        routed: Receives the router's inputs; None where the stage has no experts.
        first: The number of the first token among the stage's.
    """

    weights: Weights
    watched: dict[str, Inputs] = field(default_factory=dict)
    routings: list[Routing] = field(default_factory=list)
    routed: Tensor | None = None
    first: int = 0

    def linear(self, x: Tensor, weight: str) -> Tensor:
        """See `Ops`."""
        if weight in self.watched:
            self.watched[weight].see(x)
        if weight.endswith(("lm_head.weight", "shared_head.output.weight")):
            return x.new_empty(len(x), 0)
        return super().linear(x, weight)

    def embedding(self, token_ids: Tensor, weight: str) -> Tensor:
        """See `Ops`; reads the rows in use only."""
        unique, index = torch.unique(token_ids, return_inverse=True)
        rows = torch.stack([self.weights.expert(weight, i) for i in unique.tolist()])
        return rows[index]

    def linear_fp32(self, x: Tensor, weight: str) -> Tensor:
        """See `Ops`; the router."""
        if self.routed is not None:
            self.routed[self.first : self.first + len(x)] = x.cpu()
        return super().linear_fp32(x, weight)

    def sparse_moe(
        self,
        x: Tensor,
        selection: Tensor,
        weights: Tensor,
        experts: str,
        top_k: int,
        scale: float,
        limit: float,
    ) -> Tensor:
        """See `Ops`; chooses, and computes nothing."""
        count = selection.shape[-1]
        best = selection.topk(min(top_k + 1, count), dim=-1)
        chosen = best.indices[:, :top_k].sort(-1).values
        mix = weights.gather(-1, chosen)
        mix = mix / (mix.sum(-1, keepdim=True) + 1e-20) * scale
        margin = torch.full((len(x),), torch.inf)
        rounding = torch.zeros(len(x))
        if top_k < count:
            pair = best.indices[:, top_k - 1 :]
            margin = (best.values[:, top_k - 1] - best.values[:, top_k]).cpu()
            rounding = self._rounding(x, weights, f"{experts}.gate.weight", pair).cpu()
        self.routings.append(Routing(chosen.cpu(), mix.cpu(), margin, rounding))
        return torch.zeros_like(x)

    def _rounding(self, x: Tensor, scores: Tensor, router: str, pair: Tensor) -> Tensor:
        """How far rounding x to bf16 moves the scores of two experts apart, `[n]`.

        A score is sigmoid(w . x): it moves by p (1 - p) times the logit, and the logit by independent errors
        of at most u |w_j x_j|, whose sum stays within a few u ||w x||.
        """
        spread = (x.float().square() @ self.weights.tensor(router).float().square().T).sqrt()
        slope = scores * (1 - scores)
        return (slope * spread).gather(-1, pair).sum(-1) * (BF16_ROUNDING * ROUNDING_SIGMAS)
