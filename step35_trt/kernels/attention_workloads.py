"""Gated attention as it is met in a model: decoding at long contexts, window layers, prefill."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from step35_trt.kernels import plugin
from step35_trt.kernels.workloads import Workload
from step35_trt.rotary import inverse_frequencies

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from step35_trt.config import LayerSpec
    from step35_trt.kernels.tactics import Tactic
    from step35_trt.kernels.workloads import Bound, Scale

QUERIES: int = plugin.load("gated_attention", "geometry").QUERIES
KV = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
# bf16 keeps 8 bits of q, of the result and of the softmax's weights; e4m3 codes are read by both sides.
TOLERANCE = 2e-2
REFERENCE_ROWS = 1024  # tokens of a prefill that the definition, with its table of scores, computes


def makers(scale: Scale, device: torch.device) -> list[Callable[[], Workload]]:
    """Decoding on full layers for each context and batch, on window layers, and prefill on both."""
    full, window = scale.config.layers[0], scale.config.layers[1]
    one: list[tuple[LayerSpec, int, int, int, str, Bound]] = [
        (full, batch, 1, context, kv, "bandwidth")
        for kv in KV
        for context in scale.contexts
        for batch in scale.batches
    ]
    one += [(full, 1, QUERIES, scale.contexts[0], "bf16", "bandwidth")]
    one += [(window, batch, 1, scale.contexts[0], "bf16", "launch") for batch in scale.batches]
    one += [(layer, 1, scale.prefill, 0, "bf16", "attention") for layer in (full, window)]
    eps = scale.config.rms_norm_eps
    return [functools.partial(_workload, *case, eps, device) for case in one]


def _workload(
    layer: LayerSpec,
    batch: int,
    new: int,
    context: int,
    kv: str,
    bound: Bound,
    eps: float,
    device: torch.device,
) -> Workload:
    """`batch` sequences with `new` tokens each and `context` tokens at the end."""
    launch, naive = plugin.load("gated_attention", "launch"), plugin.load("gated_attention", "naive")
    batches = plugin.load("gated_attention", "batch")
    geometry = plugin.load("gated_attention", "geometry").Geometry.of(layer, eps, QUERIES)
    past = max(context - new, 0)
    rows = min(past + new, layer.window + max(new, QUERIES)) if layer.window else past + new
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(torch.bfloat16)

    tokens, d, g = batch * new, layer.head_dim, layer.kv_heads
    table_pages = -(-rows // geometry.page)
    cache = _cache(batches, batch, table_pages, (g, geometry.page, d), kv, generator)
    q, k, v = normal(tokens, layer.query_heads * d), normal(tokens, g * d), normal(tokens, g * d)
    gate = normal(tokens, layer.query_heads)
    gammas = 1 + 0.1 * torch.randn(2, d, generator=generator, device=device)
    frequencies = torch.from_numpy(inverse_frequencies(layer)).to(device)
    described = batches.Batch.of((new,) * batch, (past,) * batch, device)

    def attend(sequences: slice, entries: Sequence[Tactic]) -> Tensor:
        part = slice(sequences.start * new, sequences.stop * new)
        count = sequences.stop - sequences.start
        some = batches.PagedCache(
            cache.keys, cache.values, cache.table[sequences], cache.key_scale, cache.value_scale
        )
        asked = described if count == batch else batches.Batch.of((new,) * count, (past,) * count, device)
        packed = (x[part] for x in (q, k, v, gate))
        result: Tensor = launch.gated_attention(
            *packed, gammas[0], gammas[1], frequencies, some, asked, geometry, entries
        )
        return result

    def definition() -> Tensor:
        copy = batches.PagedCache(
            cache.keys.clone(), cache.values.clone(), cache.table, cache.key_scale, cache.value_scale
        )
        rows = min(new, REFERENCE_ROWS)  # of causal attention, the leading ones know nothing of the others
        some = batches.Batch.of((rows,) * batch, (past,) * batch, device)
        packed = (x[: batch * rows] for x in (q, k, v, gate))
        result: Tensor = naive.gated_attention(
            *packed, gammas[0], gammas[1], frequencies, copy, some, geometry
        )
        return result

    def alone(entries: Sequence[Tactic]) -> tuple[Tensor, Tensor]:
        last = slice(batch - 1, batch)
        return attend(slice(0, batch), entries)[-new:], attend(last, entries)

    seen = min(past + new, layer.window) if layer.window else past + new
    pairs = sum(min(p + 1, seen) for p in range(past, past + new)) * batch
    kind = f"window {layer.window}" if layer.window else "full"
    phase = "prefill" if new > QUERIES else "decode"
    return Workload(
        "gated_attention",
        f"{phase} {kind}, {kv}, {batch} x {new} tokens, context {past + new}",
        {
            "kv_heads": g,
            "share": geometry.share,
            "head_dim": d,
            "window": layer.window,
            "page": geometry.page,
            "queries": geometry.queries,
            "kv_bits": cache.keys.element_size() * 8,
        },
        bound,
        lambda entries: attend(slice(0, batch), entries),
        definition,
        _plain(layer, batch, new, past, generator),
        alone,
        TOLERANCE,
        bytes=batch * seen * 2 * g * d * cache.keys.element_size() + 2 * 2 * q.numel(),
        operations=4 * pairs * layer.query_heads * d,
    )


def _cache(
    batches: Any, sequences: int, pages: int, shape: tuple[int, ...], kv: str, generator: torch.Generator
) -> Any:
    """Random rows in pages that lie in memory as a long-lived server leaves them: in no order."""
    device, count = generator.device, sequences * pages
    order = torch.randperm(count, generator=generator, device=device).to(torch.int32)
    keys, values = torch.empty(2, count, *shape, dtype=KV[kv], device=device)
    for page in range(count):  # a page at a time: fp32 rows of a long context would not fit beside it
        keys[page], values[page] = torch.randn(2, *shape, generator=generator, device=device).to(KV[kv])
    scales = (
        torch.ones(2, shape[0], device=device)
        if kv == "bf16"
        else torch.full((2, shape[0]), 1.25, device=device)
    )
    return batches.PagedCache(keys, values, order.reshape(sequences, pages), scales[0], scales[1])


def _plain(
    layer: LayerSpec, batch: int, new: int, past: int, generator: torch.Generator
) -> Callable[[], Tensor]:
    """Only scaled_dot_product_attention, on contiguous bf16 keys and values: less than is asked of us."""
    rows = min(past + new, layer.window + new - 1) if layer.window else past + new
    held: list[Tensor] = []

    def attend() -> Tensor:
        if not held:
            shape = (batch, layer.kv_heads, rows, layer.head_dim)
            make = functools.partial(torch.randn, generator=generator, device=generator.device)
            asking = make(batch, layer.query_heads, new, layer.head_dim)
            held.extend(x.to(torch.bfloat16) for x in (asking, make(*shape), make(*shape)))
        mask = None
        if new > 1 and (layer.window or past):
            distance = torch.arange(rows - new, rows, device=generator.device)[:, None] - torch.arange(
                rows, device=generator.device
            )
            mask = (distance >= 0) & (distance < (layer.window or rows))
        return functional.scaled_dot_product_attention(
            held[0], held[1], held[2], mask, is_causal=mask is None and new > 1, enable_gqa=True
        )

    return attend
