"""The plugin on torch tensors: checks, choice of tactics, launches.

Who carries launches out decides where kernels run; by default Triton does (`step35_trt.kernels.jit`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from step35_trt.kernels.jit import JIT
from step35_trt.kernels.launching import KernelLaunch

from .geometry import PLUGIN, Geometry, constants, tactic

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from step35_trt.kernels.launching import Launcher
    from step35_trt.kernels.tactics import Tactic
    from step35_trt.kernels.variant import Constant

    from .batch import Batch, PagedCache

# What the tensor cores multiply: e4m3 becomes fp16 exactly and in one instruction.
COMPUTE = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.bfloat16,
    torch.float8_e4m3fn: torch.float16,
}


def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    q_gamma: Tensor,
    k_gamma: Tensor,
    frequencies: Tensor,
    cache: PagedCache,
    batch: Batch,
    geometry: Geometry,
    entries: Sequence[Tactic],
    launcher: Launcher = JIT,
) -> Tensor:
    """Norm, rotary, cache write, causal (windowed) attention and one sigmoid gate a head.

    Specification 2.4 and 2.5. Sequences with at most `geometry.queries` new tokens are decoded, longer ones
    prefilled; a token's bits depend on its own sequence alone.

    Args:
        q: `[t, H*d]` fp32 or bf16; `k`, `v` `[t, G*d]` and `gate` `[t, H]` logits are of its type.
        k: See `q`.
        v: See `q`.
        gate: See `q`.
        q_gamma: `[d]` fp32, one already added.
        k_gamma: Like `q_gamma`.
        frequencies: `[rotary_dims / 2]` fp32, radians per position.
        cache: Pages of the layer; rows of the new tokens are written.
        batch: Whose tokens these are.
        geometry: What the layer fixes.
        entries: The GPU's tactics.
        launcher: Carries launches out.

    Returns:
        `[t, H*d]` of q's type.

    Raises:
        ValueError: shapes, types or the page table do not fit.
        UnsupportedError: no tactic admits the geometry.
    """
    _check(q, k, v, gate, q_gamma, k_gamma, frequencies, cache, batch, geometry)
    queries = write(q, k, v, q_gamma, k_gamma, frequencies, cache, batch, geometry, entries, launcher)
    return attend(queries, gate, cache, batch, geometry, entries, torch.empty_like(q), launcher)


def write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_gamma: Tensor,
    k_gamma: Tensor,
    frequencies: Tensor,
    cache: PagedCache,
    batch: Batch,
    geometry: Geometry,
    entries: Sequence[Tactic],
    launcher: Launcher = JIT,
) -> Tensor:
    """The first half of `gated_attention`: fill the pages, return queries `[t, H, d]` in the compute type."""
    shape = len(q), geometry.query_heads, geometry.head_dim
    queries = torch.empty(shape, dtype=COMPUTE[cache.keys.dtype], device=q.device)
    chosen = tactic(entries, "prepare", geometry, _bits(cache))
    if batch.tokens:
        arguments = (
            q,
            k,
            v,
            q_gamma,
            k_gamma,
            frequencies,
            batch.token_sequence,
            batch.starts,
            batch.offsets,
            cache.table,
            cache.key_scale,
            cache.value_scale,
            queries,
            cache.keys,
            cache.values,
            cache.table.shape[1],
        )
        launcher(
            _launch(
                "prepare", (batch.tokens, geometry.kv_heads), arguments, geometry, chosen.constants, chosen
            )
        )
    return queries


def attend(
    queries: Tensor,
    gate: Tensor,
    cache: PagedCache,
    batch: Batch,
    geometry: Geometry,
    entries: Sequence[Tactic],
    out: Tensor,
    launcher: Launcher = JIT,
) -> Tensor:
    """The second half: `out` `[t, H*d]`, fully written, from the pages and `write`'s queries."""
    if batch.decoded(geometry.queries)[0]:
        _decode(queries, gate, cache, batch, geometry, entries, out, launcher)
    if any(length > geometry.queries for length in batch.lengths):
        _prefill(queries, gate, cache, batch, geometry, entries, out, launcher)
    return out


def _decode(
    queries: Tensor,
    gate: Tensor,
    cache: PagedCache,
    batch: Batch,
    geometry: Geometry,
    entries: Sequence[Tactic],
    out: Tensor,
    launcher: Launcher,
) -> None:
    chosen = tactic(entries, "decode", geometry, _bits(cache))
    tiling = {name: int(chosen.constants[name] or 0) for name in ("BLOCK_N", "SPLITS", "LEAST")}
    splits, sequences = tiling["SPLITS"], len(batch.lengths)
    states = sequences * geometry.queries * geometry.query_heads * splits if splits > 1 else 1
    partial = torch.empty(states, geometry.head_dim, dtype=torch.float32, device=out.device)
    state = torch.empty(states, 2, dtype=torch.float32, device=out.device)
    # The longest sequence decides how many splits are launched, never where they lie.
    most, longest = batch.decoded(geometry.queries)
    if geometry.window:
        longest = min(longest, geometry.window + geometry.queries + tiling["BLOCK_N"])
    launched = min(splits, -(-longest // tiling["LEAST"]))
    arguments = (
        queries,
        cache.keys,
        cache.values,
        gate,
        batch.starts,
        batch.offsets,
        cache.table,
        cache.key_scale,
        cache.value_scale,
        out,
        partial,
        state,
        cache.table.shape[1],
    )
    grid = launched, geometry.kv_heads, sequences
    launcher(_launch("decode", grid, arguments, geometry, chosen.constants, chosen))
    if splits > 1:
        put = tactic(entries, "reduce", geometry, _bits(cache))
        grid = geometry.query_heads, most, sequences
        sums = partial, state, gate, batch.starts, batch.offsets, out
        launcher(_launch("reduce", grid, sums, geometry, {**put.constants, **tiling}, put))


def _prefill(
    queries: Tensor,
    gate: Tensor,
    cache: PagedCache,
    batch: Batch,
    geometry: Geometry,
    entries: Sequence[Tactic],
    out: Tensor,
    launcher: Launcher,
) -> None:
    chosen = tactic(entries, "prefill", geometry, _bits(cache))
    blocks = batch.prefill_blocks(geometry.queries, int(chosen.constants["TOKENS"] or 0))
    arguments = (
        queries,
        cache.keys,
        cache.values,
        gate,
        blocks,
        batch.starts,
        batch.offsets,
        cache.table,
        cache.key_scale,
        cache.value_scale,
        out,
        cache.table.shape[1],
    )
    grid = geometry.query_heads // int(chosen.constants["HEADS"] or 1), len(blocks)
    launcher(_launch("prefill", grid, arguments, geometry, chosen.constants, chosen))


def _launch(
    kernel: str,
    grid: tuple[int, ...],
    arguments: tuple[Tensor | int, ...],
    geometry: Geometry,
    tiling: Mapping[str, Constant],
    options: Tactic,
) -> KernelLaunch:
    fixed = constants(kernel, geometry, tiling)
    return KernelLaunch(PLUGIN, kernel, kernel, grid, arguments, fixed, options.num_warps, options.num_stages)


def _bits(cache: PagedCache) -> int:
    return cache.keys.element_size() * 8


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    q_gamma: Tensor,
    k_gamma: Tensor,
    frequencies: Tensor,
    cache: PagedCache,
    batch: Batch,
    geometry: Geometry,
) -> None:
    """Kernels index without bounds: whatever they rely on is checked here."""
    g, t, wide = geometry, batch.tokens, torch.float32
    pages = (len(cache.keys), g.kv_heads, g.page, g.head_dim)
    table = (len(batch.lengths), *cache.table.shape[1:])
    expected = {
        "q": (q, (t, g.query_heads * g.head_dim), q.dtype),
        "k": (k, (t, g.kv_heads * g.head_dim), q.dtype),
        "v": (v, (t, g.kv_heads * g.head_dim), q.dtype),
        "gate": (gate, (t, g.query_heads), q.dtype),
        "q_gamma": (q_gamma, (g.head_dim,), wide),
        "k_gamma": (k_gamma, (g.head_dim,), wide),
        "frequencies": (frequencies, (g.rotary_dims // 2,), wide),
        "keys": (cache.keys, pages, cache.keys.dtype),
        "values": (cache.values, pages, cache.keys.dtype),
        "table": (cache.table, table, torch.int32),
        "key_scale": (cache.key_scale, (g.kv_heads,), wide),
        "value_scale": (cache.value_scale, (g.kv_heads,), wide),
    }
    for name, (tensor, shape, dtype) in expected.items():
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype} where contiguous {shape} {dtype} is needed"
            )
        if tensor.device != q.device:
            raise ValueError(f"{name} lies on {tensor.device}, q on {q.device}")
    if q.dtype not in (torch.float32, torch.bfloat16) or cache.keys.dtype not in COMPUTE:
        raise ValueError(f"activations of {q.dtype} over pages of {cache.keys.dtype} are not implemented")
    batch.check(cache, geometry)
