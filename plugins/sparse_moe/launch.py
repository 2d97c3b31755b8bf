"""The plugin on torch tensors: checks, choice of tactics, launches.

On CUDA tensors the kernels run on the GPU; on CPU tensors they run in Triton's interpreter, which has to be
asked for (`TRITON_INTERPRET=1`) before the kernels are loaded. Nothing waits for the device, so a step can be
captured in a CUDA graph.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING

import torch
import triton

from . import few_tokens, grouped, routing, sorting
from .geometry import constants
from .plan import Plan
from .weights import ExpertWeights, Matrix, expect

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from step35_trt.kernels.tactics import Tactic

    from .geometry import Geometry


def route_logits(
    logits: Tensor, bias: Tensor, geometry: Geometry, entries: Sequence[Tactic]
) -> tuple[Tensor, Tensor]:
    """Specification 2.8 from the router's product on.

    Args:
        logits: `[t, E]` fp32.
        bias: `[E]` fp32; selects and does not weigh.
        geometry: The layer.
        entries: The GPU's tactics.

    Returns:
        Ids `[t, slots]` int32, ascending, the shared expert last, and mixing weights `[t, slots]` fp32.

    Raises:
        ValueError: shapes or types do not fit.
    """
    expect("bias", bias, (geometry.experts,), torch.float32, logits.device)
    return _route("route_logits", logits, bias, geometry, entries)


def route_selection(
    selection: Tensor, weights: Tensor, geometry: Geometry, entries: Sequence[Tactic]
) -> tuple[Tensor, Tensor]:
    """As `route_logits`, from what the vocabulary's `sparse_moe` is given: both `[t, E]` fp32."""
    expect("weights", weights, (len(selection), geometry.experts), torch.float32, selection.device)
    return _route("route_selection", selection, weights, geometry, entries)


def experts(
    x: Tensor,
    ids: Tensor,
    mix: Tensor,
    weights: ExpertWeights,
    geometry: Geometry,
    entries: Sequence[Tactic],
    limit: float = 0.0,
    shared_limit: float = 0.0,
    *,
    as_for: int | None = None,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """The chosen experts' outputs, mixed (specification 2.7, 2.9): `[t, D]`.

    A token's bits do not depend on its neighbours, except that tactics are chosen by the number of tokens.

    Args:
        x: `[t, D]` bf16.
        ids: `[t, slots]` int32 from a `route_*`; ids of a token are different and in range.
        mix: `[t, slots]` fp32.
        weights: The stacks.
        geometry: The layer.
        entries: The GPU's tactics.
        limit: Of routed experts; 0 is none.
        shared_limit: Of the shared expert.
        as_for: Choose tactics as for that many tokens, which pins the bits of tokens in batches of all sizes.
        out: `[t, D]` bf16 or fp32 to write; absent, bf16 is allocated.
        workspace: At least `workspace_bytes` uint8; absent, allocated.

    Raises:
        ValueError: shapes, types or devices do not fit.
        UnsupportedError: no tactic admits the problem, or the format does not take the widths.
    """
    g, t = geometry, len(x)
    expect("x", x, (t, g.hidden), torch.bfloat16, x.device)
    expect("ids", ids, (t, g.slots), torch.int32, x.device)
    expect("mix", mix, (t, g.slots), torch.float32, x.device)
    weights.check(g, x.device)
    if out is None:
        out = torch.empty_like(x)
    expect("out", out, (t, g.hidden), torch.float32 if out.dtype == torch.float32 else x.dtype, x.device)
    plan = Plan.of(g, entries, t, t if as_for is None else as_for)
    if workspace is None:
        workspace = torch.empty(plan.bytes, dtype=torch.uint8, device=x.device)
    if workspace.dtype != torch.uint8 or workspace.numel() < plan.bytes or workspace.device != x.device:
        raise ValueError(f"workspace has to be {plan.bytes} bytes of uint8 on {x.device}")
    if t:
        limits = limit_bits(limit), limit_bits(shared_limit)
        run = _few if plan.few else _grouped
        run(x, ids, mix, weights, g, plan, limits, out, plan.views(workspace))
    return out


def workspace_bytes(
    geometry: Geometry, entries: Sequence[Tactic], tokens: int, as_for: int | None = None
) -> int:
    """Scratch memory that `experts` needs for `tokens` tokens."""
    return Plan.of(geometry, entries, tokens, tokens if as_for is None else as_for).bytes


def limit_bits(limit: float) -> int:
    """How kernels take a limit: the bits of an fp32, infinity for none, as a signed 32-bit integer."""
    return int(struct.unpack("<i", struct.pack("<f", limit or math.inf))[0])


def _route(
    kernel: str, scores: Tensor, other: Tensor, geometry: Geometry, entries: Sequence[Tactic]
) -> tuple[Tensor, Tensor]:
    t = len(scores)
    expect("logits or selection", scores, (t, geometry.experts), torch.float32, scores.device)
    ids = torch.empty(t, geometry.slots, dtype=torch.int32, device=scores.device)
    mix = torch.empty(t, geometry.slots, dtype=torch.float32, device=scores.device)
    if t:
        tactic = geometry.tactic(entries, kernel, t)
        _launch(routing, kernel, (t,), (scores, other, ids, mix), geometry, tactic)
    return ids, mix


def _few(
    x: Tensor,
    ids: Tensor,
    mix: Tensor,
    weights: ExpertWeights,
    g: Geometry,
    plan: Plan,
    limits: tuple[int, int],
    out: Tensor,
    space: dict[str, Tensor],
) -> None:
    first, second = plan.tactics["few_gate_up"], plan.tactics["few_down"]
    _launch(
        few_tokens,
        "few_gate_up",
        (ids.numel(), _tiles(g.inner, first)),
        (x, ids, *_pair(weights.gate), *_pair(weights.up), space["hidden"], *limits),
        g,
        first,
    )
    _launch(
        few_tokens,
        "few_down",
        (len(x), _tiles(g.hidden, second)),
        (space["hidden"], ids, mix, *_pair(weights.down), out),
        g,
        second,
    )


def _grouped(
    x: Tensor,
    ids: Tensor,
    mix: Tensor,
    weights: ExpertWeights,
    g: Geometry,
    plan: Plan,
    limits: tuple[int, int],
    out: Tensor,
    space: dict[str, Tensor],
) -> None:
    pairs, most = ids.numel(), plan.most_tiles
    order, tiles, hidden, partial = (space[name] for name in ("order", "tiles", "hidden", "partial"))
    gate_up, down, last = (plan.tactics[name] for name in ("grouped_gate_up", "grouped_down", "combine"))
    tile = int(gate_up.constants["TOKENS"] or 0)
    counts = space["counts"]
    _launch(sorting, "count_pairs", (g.stack,), (ids, counts, pairs), g, plan.tactics["count_pairs"])
    _launch(
        sorting,
        "place_pairs",
        (g.stack,),
        (ids, counts, order, tiles, pairs, most),
        g,
        plan.tactics["place_pairs"],
        tile,
    )
    _launch(
        grouped,
        "grouped_gate_up",
        (_tiles(g.inner, gate_up), most),
        (x, order, tiles, *_pair(weights.gate), *_pair(weights.up), hidden, *limits, most),
        g,
        gate_up,
    )
    _launch(
        grouped,
        "grouped_down",
        (_tiles(g.hidden, down), most),
        (hidden, order, tiles, mix, *_pair(weights.down), partial, most),
        g,
        down,
    )
    blocks = -(-g.hidden // int(last.constants["BLOCK"] or 0))
    _launch(grouped, "combine", (len(x), blocks), (partial, out), g, last)


def _launch(
    module: object,
    kernel: str,
    grid: tuple[int, ...],
    arguments: tuple[Tensor | int, ...],
    geometry: Geometry,
    tactic: Tactic,
    tokens_tile: int = 0,
) -> None:
    interpreted = triton.knobs.runtime.interpret
    fixed = constants(kernel, geometry, tactic, tokens_tile=tokens_tile, interpreted=interpreted)
    options = {"num_warps": tactic.num_warps, "num_stages": tactic.num_stages}
    getattr(module, kernel)[grid](*arguments, **fixed, **options)


def _tiles(rows: int, tactic: Tactic) -> int:
    return -(-rows // int(tactic.constants["ROWS"] or 0))


def _pair(matrix: Matrix) -> tuple[Tensor, Tensor]:
    """Values and scales; values stand in for scales where a format has none, and are not read as such."""
    return matrix.values, matrix.values if matrix.scales is None else matrix.scales
