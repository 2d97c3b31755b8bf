"""Every compilation of this plugin that a model needs on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from step35_trt.kernels.variant import KernelVariant

from .geometry import PLUGIN, QUERIES, Geometry, constants, tactic

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from step35_trt.config import Step35Config
    from step35_trt.kernels.tactics import Tactics

_CACHE = ("table", "key_scale", "value_scale")
_READ = ("queries", "keys", "values", "gate")
ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "prepare": (
        *("q", "k", "v", "q_gamma", "k_gamma", "frequencies", "token_sequence", "starts", "pasts"),
        *(*_CACHE, "queries", "keys", "values", "table_pages"),
    ),
    "decode": (*_READ, "starts", "pasts", *_CACHE, "out", "partial", "partial_state", "table_pages"),
    "reduce": ("partial", "partial_state", "gate", "starts", "pasts", "out"),
    "prefill": (*_READ, "blocks", "starts", "pasts", *_CACHE, "out", "table_pages"),
}
"""Each kernel's arguments that are no constants, in order; `launch.py` passes them so."""

FP32 = ("q_gamma", "k_gamma", "frequencies", "key_scale", "value_scale", "partial", "partial_state")
ACTIVATIONS = ("q", "k", "v", "gate", "out")
# Pages and what their products are computed in.
PAGES = {"bf16": ("bf16", "bf16"), "fp8": ("fp8e4nv", "fp16")}


def variants(config: Step35Config, target: int, tactics: Tactics) -> list[KernelVariant]:
    """Both kinds of layers over both kinds of pages; `target` is a compute capability (90 is 9.0).

    Activations are bf16.

    Raises:
        UnsupportedError: a layer's geometry has no tactic.
    """
    layers = (*config.layers, *config.mtp_layers)
    geometries = dict.fromkeys(Geometry.of(layer, config.rms_norm_eps, QUERIES) for layer in layers)
    return [v for g in geometries for pages in PAGES for v in _of_layer(g, pages, target, tactics)]


def _of_layer(geometry: Geometry, pages: str, target: int, tactics: Tactics) -> Iterator[KernelVariant]:
    bits = {"bf16": 16, "fp8": 8}[pages]
    decode = tactic(tactics.entries, "decode", geometry, bits)
    splits = {name: decode.constants[name] for name in ("BLOCK_N", "SPLITS", "LEAST")}
    for kernel in ARGUMENTS:
        if kernel == "reduce" and splits["SPLITS"] == 1:
            continue  # decode writes the result itself
        chosen = tactic(tactics.entries, kernel, geometry, bits)
        tiling = {**chosen.constants, **splits} if kernel == "reduce" else chosen.constants
        fixed = constants(kernel, geometry, tiling)
        signature = {name: _type(name, pages) for name in ARGUMENTS[kernel]}
        kind = f"window{geometry.window}" if geometry.window else "full"
        heads = f"{geometry.query_heads}x{geometry.kv_heads}x{geometry.head_dim}"
        yield KernelVariant(
            plugin=PLUGIN,
            module=kernel,
            function=kernel,
            name=f"{kernel}-{kind}-{heads}-{pages}-sm_{target}",
            signature=signature,
            constants=fixed,
            aligned=tuple(name for name, kind in signature.items() if kind.startswith("*")),
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
        )


def _type(name: str, pages: str) -> str:
    if name == "table_pages":
        return "i32"
    stored, computed = PAGES[pages]
    types = {"keys": stored, "values": stored, "queries": computed}
    types |= dict.fromkeys(ACTIVATIONS, "bf16") | dict.fromkeys(FP32, "fp32")
    return "*" + types.get(name, "i32")
