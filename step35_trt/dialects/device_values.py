"""The plugins in plain torch without a look at any value: what a recorder of graphs can record on any device.

They take what the GPU kernels take: pages, and device tensors that say which tokens belong to which sequence.
So the way from a step's order to its results can be run, recorded and replayed where there is no GPU. They
read every page of a table line and multiply by every expert: for small models only.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from step35_trt.dialects.torch import rotate

if TYPE_CHECKING:
    from torch import Tensor

    from step35_trt.dialects.torch import HeldWeights


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    q_gamma: Tensor,
    k_gamma: Tensor,
    frequencies: Tensor,
    cache: Any,
    batch: Any,
    geometry: Any,
) -> Tensor:
    """`gated_attention.launch.gated_attention`, its arguments up to the tactics; `[t, H*d]` of q's type."""
    g, sequence = geometry, batch.token_sequence.long()
    starts, pasts = batch.starts.long(), batch.offsets.long()
    counts = starts.diff()
    positions = pasts[sequence] + torch.arange(len(q), device=q.device) - starts[sequence]
    queries = rotate(_norm(q.view(-1, g.query_heads, g.head_dim), q_gamma, g.eps), positions, frequencies)
    keys = rotate(_norm(k.view(-1, g.kv_heads, g.head_dim), k_gamma, g.eps), positions, frequencies)
    table, span = cache.table.long()[sequence], cache.table.shape[1] * g.page
    place = (positions // g.page % cache.table.shape[1])[:, None]
    page, row = table.gather(1, place)[:, 0], positions % g.page
    cache.keys[page, :, row] = keys.to(cache.keys.dtype)
    cache.values[page, :, row] = v.view(-1, g.kv_heads, g.head_dim).to(cache.values.dtype)
    # The newest position that each row of a line can hold; of a ring the others were overwritten.
    row_of_line = torch.arange(span, device=q.device)
    last = (pasts + counts)[sequence][:, None] - 1
    held = row_of_line + torch.div(last - row_of_line, span, rounding_mode="floor") * span
    distance = positions[:, None] - held
    seen = (distance >= 0) & (held >= 0)
    if g.window:
        seen &= distance < g.window
    # Pages nobody wrote hold anything, NaN too, which a weight of zero would not silence.
    rows = (
        pages[table].transpose(2, 3).reshape(len(q), span, g.kv_heads, g.head_dim)
        for pages in (cache.keys, cache.values)
    )
    keys, values = (x.masked_fill(~seen[..., None, None], 0.0) for x in rows)
    query = queries.view(-1, g.kv_heads, g.share, g.head_dim).float()
    scores = torch.einsum("tghd,trgd->tghr", query, keys.float()) / math.sqrt(g.head_dim)
    scores = scores.masked_fill(~seen[:, None, None], -math.inf)
    mixed = torch.einsum("tghr,trgd->tghd", scores.softmax(-1), values.float()).flatten(1, 2)
    return (mixed * torch.sigmoid(gate.float())[..., None]).flatten(1).to(q.dtype)


def every_expert(
    x: Tensor,
    selection: Tensor,
    weights: Tensor,
    held: HeldWeights,
    experts: str,
    top_k: int,
    scale: float,
    limit: float,
) -> Tensor:
    """`Ops.sparse_moe` by all experts that `held` has, each weighed by zero where it was not chosen."""
    chosen = selection.topk(top_k, dim=-1).indices
    mix = weights.gather(-1, chosen)
    mix = mix / (mix.sum(-1, keepdim=True) + 1e-20) * scale
    weighed = torch.zeros_like(weights).scatter(1, chosen, mix)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(selection.shape[1]):
        gate, up, down = (
            held.expert(f"{experts}.{part}.weight", expert) for part in ("gate_proj", "up_proj", "down_proj")
        )
        if gate is None or up is None or down is None:
            continue
        activated, linear = functional.silu(functional.linear(x, gate)), functional.linear(x, up)
        if limit:
            activated, linear = activated.clamp(max=limit), linear.clamp(-limit, limit)
        out = out + functional.linear(activated * linear, down).float() * weighed[:, expert, None]
    return out.to(x.dtype)


def _norm(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * gamma).to(x.dtype)
