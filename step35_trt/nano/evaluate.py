"""How well nano predicts, and how often its drafts would be accepted."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from step35_trt import model
from step35_trt.dialects.torch import SequenceBatch
from step35_trt.nano.parameters import CountingOps

if TYPE_CHECKING:
    from step35_trt.config import Step35Config
    from step35_trt.dialects.torch import Weights


@dataclass(frozen=True)
class Prediction:
    """Everything the model says about a batch `[B, L]` of token ids.

    `main [B, L, V]` at row p is about token p+1; `drafts[k] [B, L-1-k, V]` at row p about token p+2+k.
    `loads` counts the tokens of each MoE layer's experts.
    """

    main: Tensor
    drafts: tuple[Tensor, ...]
    loads: dict[str, Tensor]


def predict(
    weights: Weights, config: Step35Config, tokens: Tensor, modules: int, frozen_decoder: bool = False
) -> Prediction:
    """Run the decoder and the first `modules` MTP modules over whole sequences (specification 3.2)."""
    count, length = tokens.shape
    ops = CountingOps(weights, SequenceBatch.fresh(*(length,) * count))
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen_decoder):
        logits, hidden = model.decoder(ops, config, tokens.flatten(), torch.arange(tokens.numel()))
    hidden = hidden.view(count, length, -1)
    drafts = []
    for k in range(modules):
        rows = length - 1 - k
        ops = CountingOps(weights, SequenceBatch.fresh(*(rows,) * count), loads=ops.loads)
        ids, carried = tokens[:, 1 + k :].flatten(), hidden[:, :rows].flatten(0, 1)
        draft, hidden = model.mtp_module(ops, config, k, ids, carried, torch.arange(count * rows))
        hidden = hidden.view(count, rows, -1)
        drafts.append(draft.view(count, rows, -1))
    return Prediction(logits.view(count, length, -1), tuple(drafts), ops.loads)


@dataclass
class Summary:
    """Figures over held-out text.

    `loss` is in nats a token. `accepted[k]` is the share of rows where module k's greedy choice is the
    decoder's own, whatever the modules before it said; `chained[k]` the share among rows where all modules
    before it were right as well.
    """

    tokens: int = 0
    loss: float = 0.0
    accepted: list[float] = field(default_factory=list)
    chained: list[float] = field(default_factory=list)
    loads: dict[str, list[int]] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """Of a token."""
        return math.exp(self.loss)


@torch.no_grad()
def summarise(
    weights: Weights, config: Step35Config, tokens: Tensor, length: int = 512, every: int = 4
) -> Summary:
    """Cut `tokens` into sequences of `length` and look at all predictions in one of `every` sequences."""
    modules = config.num_nextn_predict_layers
    rows = tokens[: len(tokens) // length * length].view(-1, length)[::every]
    losses, matches = [], []
    loads: dict[str, Tensor] = {}
    for row in rows:
        said = predict(weights, config, row[None], modules)
        losses.append(functional.cross_entropy(said.main[0, :-1].float(), row[1:], reduction="sum"))
        own = said.main[0].argmax(-1)
        last = length - modules  # rows every module has
        # Module k at row p drafts what the decoder chooses at row p+1+k.
        matches.append(
            torch.stack([d[0, :last].argmax(-1) == own[1 + k :][:last] for k, d in enumerate(said.drafts)])
        )
        for name, load in said.loads.items():
            loads[name] = loads.get(name, torch.zeros_like(load)) + load
    match = torch.cat(matches, dim=1)
    together = match.cumprod(0).sum(1).tolist()
    return Summary(
        tokens=rows.numel(),
        loss=torch.stack(losses).sum().item() / (rows.numel() - len(rows)),
        accepted=match.float().mean(1).tolist(),
        chained=[n / max(1, d) for n, d in zip(together, [match.shape[1], *together[:-1]], strict=True)],
        loads={name: load.tolist() for name, load in loads.items()},
    )
