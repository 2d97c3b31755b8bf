"""The definition of the plugin: plain torch in fp32, with the launch functions' arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor

    from .geometry import Geometry
    from .weights import ExpertWeights


def route_logits(logits: Tensor, bias: Tensor, geometry: Geometry, first: int = 0) -> tuple[Tensor, Tensor]:
    """Specification 2.8: the bias selects and does not weigh."""
    scores = torch.sigmoid(logits)
    return route_selection(scores + bias, scores, geometry, first)


def route_selection(
    selection: Tensor, weights: Tensor, geometry: Geometry, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Ids `[t, slots]` int32, ascending, the shared expert last, and mixing weights `[t, slots]` fp32.

    Where only some experts are held, from `first` on, ids count from there, and those of others are -1.
    """
    ranked = selection.sort(dim=-1, descending=True, stable=True).indices
    ids = ranked[:, : geometry.top_k].sort(dim=-1).values
    mix = weights.gather(-1, ids)
    mix = mix / (mix.sum(-1, keepdim=True) + 1e-20) * geometry.scale
    if geometry.dealt:
        ids = torch.where((ids >= first) & (ids < first + geometry.here), ids - first, -1)
    if geometry.shared:
        ids = functional.pad(ids, (0, 1), value=geometry.experts)
        mix = functional.pad(mix, (0, 1), value=1.0)
    return ids.to(torch.int32), mix


def experts(
    x: Tensor,
    ids: Tensor,
    mix: Tensor,
    weights: ExpertWeights,
    geometry: Geometry,
    limit: float = 0.0,
    shared_limit: float = 0.0,
) -> Tensor:
    """Specification 2.7 and 2.9, every expert in fp32: `[t, D]` fp32."""
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in sorted(set(ids.flatten().tolist()) - {-1}):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up, down = (
            matrix.expert(geometry.format, expert) for matrix in (weights.gate, weights.up, weights.down)
        )
        some = x[token].float()
        bound = shared_limit if expert == geometry.experts else limit
        hidden = clipped_swiglu(functional.linear(some, gate), functional.linear(some, up), bound)
        y.index_add_(0, token, functional.linear(hidden, down) * mix[token, slot, None])
    return y


def clipped_swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """Specification 2.7; limit 0 is none."""
    activated = functional.silu(gate)
    if limit:
        activated, up = activated.clamp(max=limit), up.clamp(-limit, limit)
    return activated * up
