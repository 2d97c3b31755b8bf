"""The plugin on torch tensors: checks, choice of tactics, launches.

Who carries launches out decides where kernels run; by default Triton does (`step35_trt.kernels.jit`). Nothing
waits for the device, so a step can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING

import torch

from step35_trt.kernels.jit import JIT
from step35_trt.kernels.launching import KernelLaunch

from .geometry import KERNELS, PLUGIN, constants
from .plan import Plan
from .weights import ExpertWeights, Matrix, expect

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from step35_trt.kernels.launching import Launcher
    from step35_trt.kernels.tactics import Tactic

    from .geometry import Geometry


def route_logits(
    logits: Tensor,
    bias: Tensor,
    geometry: Geometry,
    entries: Sequence[Tactic],
    launcher: Launcher = JIT,
    *,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """Specification 2.8 from the router's product on.

    Args:
        logits: `[t, E]` fp32.
        bias: `[E]` fp32; selects and does not weigh.
        geometry: The layer.
        entries: The GPU's tactics.
        launcher: Carries the launch out.
        first: Of the experts that are held, where others are held elsewhere: ids count from it.

    Returns:
        Ids `[t, slots]` int32, ascending, the shared expert last, -1 for experts that are not held, and
        mixing weights `[t, slots]` fp32.

    Raises:
        ValueError: shapes or types do not fit.
    """
    expect("bias", bias, (geometry.experts,), torch.float32, logits.device)
    return _route("route_logits", logits, bias, geometry, entries, launcher, first)


def route_selection(
    selection: Tensor,
    weights: Tensor,
    geometry: Geometry,
    entries: Sequence[Tactic],
    launcher: Launcher = JIT,
    *,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """As `route_logits`, from what the vocabulary's `sparse_moe` is given: both `[t, E]` fp32."""
    expect("weights", weights, (len(selection), geometry.experts), torch.float32, selection.device)
    return _route("route_selection", selection, weights, geometry, entries, launcher, first)


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
    launcher: Launcher = JIT,
) -> Tensor:
    """The chosen experts' outputs, mixed (specification 2.7, 2.9): `[t, D]`.

    A token's bits do not depend on its neighbours, except that tactics are chosen by the number of tokens.

    Args:
        x: `[t, D]` bf16.
        ids: `[t, slots]` int32 from a `route_*`; ids of a token are different and in range, but for -1.
        mix: `[t, slots]` fp32.
        weights: The stacks.
        geometry: The layer.
        entries: The GPU's tactics.
        limit: Of routed experts; 0 is none.
        shared_limit: Of the shared expert.
        as_for: Choose tactics as for that many tokens, which pins the bits of tokens in batches of all sizes.
        out: `[t, D]` bf16 or fp32 to write; absent, bf16 is allocated.
        workspace: At least `workspace_bytes` uint8; absent, allocated.
        launcher: Carries launches out.

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
        run(x, ids, mix, weights, g, plan, limits, out, plan.views(workspace), launcher)
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
    kernel: str,
    scores: Tensor,
    other: Tensor,
    geometry: Geometry,
    entries: Sequence[Tactic],
    launcher: Launcher,
    first: int,
) -> tuple[Tensor, Tensor]:
    if not 0 <= first <= geometry.experts - geometry.here:
        raise ValueError(f"{geometry.here} experts from {first} on, of {geometry.experts}")
    t = len(scores)
    expect("logits or selection", scores, (t, geometry.experts), torch.float32, scores.device)
    ids = torch.empty(t, geometry.slots, dtype=torch.int32, device=scores.device)
    mix = torch.empty(t, geometry.slots, dtype=torch.float32, device=scores.device)
    if t:
        tactic = geometry.tactic(entries, kernel, t)
        _launch(launcher, kernel, (t,), (scores, other, ids, mix, first), geometry, tactic)
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
    launcher: Launcher,
) -> None:
    first, second = plan.tactics["few_gate_up"], plan.tactics["few_down"]
    _launch(
        launcher,
        "few_gate_up",
        (ids.numel(), _tiles(g.inner, first)),
        (x, ids, *_pair(weights.gate), *_pair(weights.up), space["hidden"], *limits),
        g,
        first,
    )
    _launch(
        launcher,
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
    launcher: Launcher,
) -> None:
    pairs, most = ids.numel(), plan.most_tiles
    order, tiles, hidden, partial = (space[name] for name in ("order", "tiles", "hidden", "partial"))
    gate_up, down, last = (plan.tactics[name] for name in ("grouped_gate_up", "grouped_down", "combine"))
    tile = int(gate_up.constants["TOKENS"] or 0)
    counts = space["counts"]
    _launch(launcher, "count_pairs", (g.stack,), (ids, counts, pairs), g, plan.tactics["count_pairs"])
    _launch(
        launcher,
        "place_pairs",
        (g.stack,),
        (ids, counts, order, tiles, pairs, most),
        g,
        plan.tactics["place_pairs"],
        tile,
    )
    _launch(
        launcher,
        "grouped_gate_up",
        (_tiles(g.inner, gate_up), most),
        (x, order, tiles, *_pair(weights.gate), *_pair(weights.up), hidden, *limits, most),
        g,
        gate_up,
    )
    _launch(
        launcher,
        "grouped_down",
        (_tiles(g.hidden, down), most),
        (hidden, order, tiles, mix, *_pair(weights.down), partial, most),
        g,
        down,
    )
    blocks = -(-g.hidden // int(last.constants["BLOCK"] or 0))
    _launch(launcher, "combine", (len(x), blocks), (partial, ids, out), g, last)


def _launch(
    launcher: Launcher,
    kernel: str,
    grid: tuple[int, ...],
    arguments: tuple[Tensor | int, ...],
    geometry: Geometry,
    tactic: Tactic,
    tokens_tile: int = 0,
) -> None:
    interpreted = launcher.interpreted
    fixed = constants(kernel, geometry, tactic, tokens_tile=tokens_tile, interpreted=interpreted)
    options = tactic.num_warps, tactic.num_stages
    launcher(KernelLaunch(PLUGIN, KERNELS[kernel], kernel, grid, arguments, fixed, *options))


def _tiles(rows: int, tactic: Tactic) -> int:
    return -(-rows // int(tactic.constants["ROWS"] or 0))


def _pair(matrix: Matrix) -> tuple[Tensor, Tensor]:
    """Values and scales; values stand in for scales where a format has none, and are not read as such."""
    return matrix.values, matrix.values if matrix.scales is None else matrix.scales
