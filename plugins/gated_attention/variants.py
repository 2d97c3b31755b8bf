"""Every compilation of this plugin that a model needs on a GPU."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from step35_trt.kernels.variant import KernelVariant

from .geometry import Geometry, constants, tactic

if TYPE_CHECKING:
    from collections.abc import Iterator

    from step35_trt.config import Step35Config
    from step35_trt.kernels.tactics import Tactics

PLUGIN = "gated_attention"
FP32 = ("q_gamma", "k_gamma", "frequencies", "key_scale", "value_scale", "partial", "partial_state")
ACTIVATIONS = ("q", "k", "v", "gate", "out")
# Pages and what their products are computed in.
PAGES = {"bf16": ("bf16", "bf16"), "fp8": ("fp8e4nv", "fp16")}


def variants(config: Step35Config, target: int, tactics: Tactics) -> list[KernelVariant]:
    """Both kinds of layers over both kinds of pages; `target` is a compute capability (90 is 9.0).

    Activations are bf16. Decoding takes as many new tokens of a sequence as the model can draft, and one.

    Raises:
        UnsupportedError: a layer's geometry has no tactic.
    """
    queries = config.num_nextn_predict_layers + 1
    layers = (*config.layers, *config.mtp_layers)
    geometries = dict.fromkeys(Geometry.of(layer, config.rms_norm_eps, queries) for layer in layers)
    return [v for g in geometries for pages in PAGES for v in _of_layer(g, pages, target, tactics)]


def _of_layer(geometry: Geometry, pages: str, target: int, tactics: Tactics) -> Iterator[KernelVariant]:
    bits = {"bf16": 16, "fp8": 8}[pages]
    decode = tactic(tactics.entries, "decode", geometry, bits)
    splits = {name: decode.constants[name] for name in ("BLOCK_N", "SPLITS", "LEAST")}
    for kernel in ("prepare", "decode", "reduce", "prefill"):
        if kernel == "reduce" and splits["SPLITS"] == 1:
            continue  # decode writes the result itself
        chosen = tactic(tactics.entries, kernel, geometry, bits)
        tiling = {**chosen.constants, **splits} if kernel == "reduce" else chosen.constants
        fixed = constants(kernel, geometry, tiling)
        function = getattr(importlib.import_module(f".{kernel}", __package__), kernel)
        signature = {name: _type(name, pages) for name in function.arg_names if name not in fixed}
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
