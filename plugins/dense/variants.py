"""Every compilation of dense algebra for given shapes: all tilings of each product, norms, gates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from step35_trt.kernels.variant import KernelVariant

from ..sparse_moe.variants import SCALES, VALUES
from .geometry import (
    GATE_WARPS,
    KERNELS,
    NORM_WARPS,
    PLUGIN,
    ROW_STAGES,
    TILINGS,
    Tiling,
    gate_constants,
    norm_constants,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from step35_trt.kernels.variant import Constant

    from ..sparse_moe.pack import Format

_PRODUCT = ("x", "values", "scales", "y", "tokens")
ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "few_linear": _PRODUCT,
    "linear": _PRODUCT,
    "rms_norm": ("x", "gamma", "y"),
    "swiglu": ("gate", "up", "y", "limit"),
}
"""Each kernel's arguments that are no constants, in order; `launch.py` passes them so."""

_TYPES = {
    **dict.fromkeys(("x", "y", "gate", "up"), "*bf16"),
    "gamma": "*fp32",
    "tokens": "i32",
    "limit": "fp32",
}


def variants(
    products: Iterable[tuple[int, int, Format]], norms: Iterable[tuple[int, float]], gates: Iterable[int]
) -> list[KernelVariant]:
    """Activations are bf16.

    Args:
        products: Output features, input features and coding of every matrix, none twice.
        norms: Width and epsilon.
        gates: Widths.
    """
    found = [_product(n, k, kind, tiling) for n, k, kind in products for tiling in TILINGS]
    for width, eps in norms:
        name = f"rms_norm-{width}-{eps:g}"
        found.append(_variant("rms_norm", name, _TYPES, norm_constants(width, eps), NORM_WARPS, ROW_STAGES))
    for width in gates:
        name = f"swiglu-{width}"
        found.append(_variant("swiglu", name, _TYPES, gate_constants(width), GATE_WARPS, ROW_STAGES))
    return found


def _product(n: int, k: int, kind: Format, tiling: Tiling) -> KernelVariant:
    name = f"{tiling.kernel}-{n}x{k}-{kind}-by{tiling.rows}x{tiling.tokens}"
    types = _TYPES | {"values": VALUES[kind], "scales": SCALES[kind]}
    fixed = tiling.constants(n, k, kind, interpreted=False)
    return _variant(tiling.kernel, name, types, fixed, tiling.num_warps, tiling.num_stages)


def _variant(
    kernel: str,
    name: str,
    types: Mapping[str, str],
    fixed: Mapping[str, Constant],
    num_warps: int,
    num_stages: int,
) -> KernelVariant:
    signature = {argument: types[argument] for argument in ARGUMENTS[kernel]}
    return KernelVariant(
        plugin=PLUGIN,
        module=KERNELS[kernel],
        function=kernel,
        name=name,
        signature=signature,
        constants=fixed,
        aligned=tuple(argument for argument, kind in signature.items() if kind.startswith("*")),
        num_warps=num_warps,
        num_stages=num_stages,
    )
