"""The experts of one layer, from router logits to output, for one token to a prefill's thousands."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from step35_trt.kernels import plugin
from step35_trt.kernels.workloads import ExpertsCall, Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from step35_trt.kernels.tactics import Tactic
    from step35_trt.kernels.workloads import Scale

FORMATS = ("int4", "fp8_block", "fp8_channel", "bf16")
LIMIT = 7.0  # of the model's last two layers
REFERENCE_ROWS = 4  # the definition decodes each expert it meets, which takes a while
MATMUL_TOKENS = 1024  # from here on weights are reused enough that multiplying is what limits
# Activations inside an expert are rounded to bf16 once, results too.
TOLERANCE = 2e-2


def makers(scale: Scale, device: torch.device) -> list[Callable[[], Workload]]:
    """Each format with each number of tokens; workloads of a format share their weights."""
    return [
        functools.partial(_workload, scale, kind, tokens, device)
        for kind in FORMATS
        for tokens in scale.tokens
    ]


def _workload(scale: Scale, kind: str, tokens: int, device: torch.device) -> Workload:
    launch, naive = plugin.load("sparse_moe", "launch"), plugin.load("sparse_moe", "naive")
    config = scale.config
    geometry = plugin.load("sparse_moe", "geometry").Geometry(
        experts=scale.experts,
        top_k=config.moe_top_k,
        hidden=config.hidden_size,
        inner=config.moe_intermediate_size,
        scale=config.moe_router_scaling_factor,
        format=kind,
    )
    weights = _weights(geometry, device)
    generator = torch.Generator(device).manual_seed(tokens)
    x = torch.randn(tokens, geometry.hidden, generator=generator, device=device).to(torch.bfloat16)
    logits = torch.randn(tokens, geometry.experts, generator=generator, device=device)
    bias = 0.1 * torch.randn(geometry.experts, generator=generator, device=device)

    def run(entries: Sequence[Tactic], rows: int = tokens) -> Tensor:
        ids, mix = launch.route_logits(logits[:rows], bias, geometry, entries)
        result: Tensor = launch.experts(x[:rows], ids, mix, weights, geometry, entries, LIMIT, as_for=tokens)
        return result

    def definition() -> Tensor:
        rows = min(tokens, REFERENCE_ROWS)
        ids, mix = naive.route_logits(logits[:rows], bias, geometry)
        result: Tensor = naive.experts(x[:rows], ids, mix, weights, geometry, LIMIT)
        return result

    ids, mix = naive.route_logits(logits, bias, geometry)
    distinct = len(set(ids.flatten().tolist()))
    held = sum(
        part[0].numel() * part.element_size()
        for matrix in (weights.gate, weights.up, weights.down)
        for part in (matrix.values, matrix.scales)
        if part is not None
    )
    return Workload(
        "sparse_moe",
        f"experts {kind}, {tokens} tokens ({distinct} of {geometry.experts} experts)",
        geometry.problem(tokens),
        "matmul" if tokens >= MATMUL_TOKENS else "bandwidth",
        run,
        definition,
        lambda: _plain(x, ids, mix, geometry),
        lambda entries: (run(entries)[:1], run(entries, 1)),
        TOLERANCE,
        bytes=distinct * held + 2 * x.numel() * x.element_size(),
        operations=6 * ids.numel() * geometry.hidden * geometry.inner,
        experts=ExpertsCall(x, ids, mix, weights, geometry, LIMIT),
    )


@functools.lru_cache(maxsize=1)
def _weights(geometry: Any, device: torch.device) -> Any:
    """Random codes and scales that give weights of a trained model's magnitude."""
    module, pack = plugin.load("sparse_moe", "weights"), plugin.load("sparse_moe", "pack")
    generator = torch.Generator(device).manual_seed(0)
    value_type, scale_type = module.DTYPES[geometry.format]

    def matrix(n: int, k: int) -> Any:
        shape, scale_shape = pack.shapes(geometry.format, n, k)
        values = torch.empty(geometry.stack, *shape, dtype=value_type, device=device)
        for expert in values:  # one at a time: fp32 numbers of all would not fit beside them
            if value_type == torch.int16:
                expert.random_(-(1 << 15), 1 << 15, generator=generator)
            else:
                spread = 1.0 if geometry.format != "bf16" else k**-0.5
                expert.copy_(spread * torch.randn(shape, generator=generator, device=device))
        if not scale_shape:
            return module.Matrix(values, None)
        halves = 2 if scale_type == torch.int32 else 1  # two fp16 share a word
        shape = (geometry.stack, *scale_shape, halves)
        typical = 4.6 if halves == 2 else 1.0  # of uniform codes -8 .. 7, of normal numbers
        scales = (torch.rand(shape, generator=generator, device=device) + 0.5) * (k**-0.5 / typical)
        if halves == 2:
            return module.Matrix(values, scales.half().view(scale_type)[..., 0].contiguous())
        return module.Matrix(values, scales[..., 0].to(scale_type).contiguous())

    gate, up = matrix(geometry.inner, geometry.hidden), matrix(geometry.inner, geometry.hidden)
    return module.ExpertWeights(gate, up, matrix(geometry.hidden, geometry.inner))


@functools.lru_cache(maxsize=1)
def _plain_weights(experts: int, inner: int, hidden: int, device: torch.device) -> list[Tensor]:
    shapes = (experts, inner, hidden), (experts, inner, hidden), (experts, hidden, inner)
    return [
        torch.randn(shape, dtype=torch.bfloat16, device=device).mul_(shape[-1] ** -0.5) for shape in shapes
    ]


def _plain(x: Tensor, ids: Tensor, mix: Tensor, geometry: Any) -> Tensor:
    """What a model's own code does: a loop over the chosen experts, bf16 weights whatever ours are."""
    gate, up, down = _plain_weights(geometry.experts, geometry.inner, geometry.hidden, x.device)
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in sorted(set(ids.flatten().tolist())):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        some = x[token]
        activated = functional.silu(functional.linear(some, gate[expert])).clamp(max=LIMIT)
        hidden = activated * functional.linear(some, up[expert]).clamp(-LIMIT, LIMIT)
        y.index_add_(0, token, functional.linear(hidden, down[expert]) * mix[token, slot, None])
    return y.to(x.dtype)
