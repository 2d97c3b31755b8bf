"""The definition of the plugin: plain torch in fp32 over the same pages, with the kernels' arguments."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from .batch import Batch, PagedCache
    from .geometry import Geometry


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
) -> Tensor:
    """Write the new rows to `cache` and return `[t, H*d]` fp32; arguments as in `launch.gated_attention`."""
    queries = prepare(q, k, v, q_gamma, k_gamma, frequencies, cache, batch, geometry)
    return attention(queries, gate, cache, batch, geometry)


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_gamma: Tensor,
    k_gamma: Tensor,
    frequencies: Tensor,
    cache: PagedCache,
    batch: Batch,
    geometry: Geometry,
) -> Tensor:
    """Queries `[t, H, d]` fp32, normed and turned; keys and values of the new tokens go to their pages."""
    g = geometry
    queries = torch.empty(len(q), g.query_heads, g.head_dim, device=q.device)
    for s, part, past in _sequences(batch):
        positions = torch.arange(past, past + part.stop - part.start, device=q.device)
        queries[part] = _turn(
            _norm(q[part].view(-1, g.query_heads, g.head_dim), q_gamma, g.eps), positions, frequencies
        )
        keys = _turn(_norm(k[part].view(-1, g.kv_heads, g.head_dim), k_gamma, g.eps), positions, frequencies)
        values = v[part].view(-1, g.kv_heads, g.head_dim).float()
        page, row = _rows(cache, s, positions, g)
        cache.keys[page, :, row] = _stored(keys, cache.key_scale, cache.keys.dtype)
        cache.values[page, :, row] = _stored(values, cache.value_scale, cache.values.dtype)
    return queries


def attention(queries: Tensor, gate: Tensor, cache: PagedCache, batch: Batch, geometry: Geometry) -> Tensor:
    """Softmax over the visible rows of the pages times sigmoid of `gate`: `[t, H*d]` fp32."""
    g = geometry
    out = torch.empty(len(queries), g.query_heads, g.head_dim, device=queries.device)
    for s, part, past in _sequences(batch):
        asking = torch.arange(past, past + part.stop - part.start, device=queries.device)
        first = max(0, past - g.window + 1) if g.window else 0
        positions = torch.arange(first, past + len(asking), device=queries.device)
        page, row = _rows(cache, s, positions, g)
        keys = cache.keys[page, :, row].float() * cache.key_scale[:, None]
        values = cache.values[page, :, row].float() * cache.value_scale[:, None]
        distance = asking[:, None] - positions
        seen = distance >= 0
        if g.window:
            seen &= distance < g.window
        query = queries[part].float().view(-1, g.kv_heads, g.share, g.head_dim)
        scores = torch.einsum("tghd,rgd->tghr", query, keys) / math.sqrt(g.head_dim)
        scores.masked_fill_(~seen[:, None, None], -math.inf)
        mixed = torch.einsum("tghr,rgd->tghd", scores.softmax(-1), values)
        out[part] = mixed.flatten(1, 2)
    return (out * torch.sigmoid(gate.float())[..., None]).flatten(1)


def _sequences(batch: Batch) -> Iterator[tuple[int, slice, int]]:
    start = 0
    for s, (length, past) in enumerate(zip(batch.lengths, batch.pasts, strict=True)):
        if length:
            yield s, slice(start, start + length), past
        start += length


def _rows(cache: PagedCache, sequence: int, positions: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Page and row of each position."""
    entry = (positions // geometry.page) % cache.table.shape[1]
    return cache.table[sequence][entry].long(), positions % geometry.page


def _norm(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * gamma


def _turn(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    half = len(frequencies)
    angle = positions.float()[:, None] * frequencies
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _stored(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    x = x / scale[:, None]
    if dtype == torch.float8_e4m3fn:
        largest = torch.finfo(dtype).max
        x = x.clamp(-largest, largest)
    return x.to(dtype)
