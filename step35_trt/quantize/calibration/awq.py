"""AWQ (arXiv 2306.00978) under the constraint that the model can take the scale: one search for each input.

Candidates are those of ModelOpt's `awq_lite`, which searches each linear for itself; here all matrices that
share an input are judged together, and only scales that can be folded exactly are tried. No scale at all is a
candidate as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from step35_trt.quantize.calibration.quantisers import Groups

if TYPE_CHECKING:
    from torch import Tensor

    from step35_trt.quantize.formats import Coding

ALPHAS = tuple(round(0.1 * i, 1) for i in range(11))
TINY = float(torch.finfo(torch.float32).tiny)
IN_CACHE = 128  # rows that are rounded at a time
EDGES = (1e-4, 1e4)  # as ModelOpt bounds a scale before it is levelled


@dataclass(frozen=True)
class Product:
    """One matrix, or a part of its rows, and inputs it is multiplied with.

    Attributes:
        kind: Errors are summed over products of a kind and taken relative to their outputs.
        weight: fp32 `[n, K]`.
        coding: How the matrix will be stored.
        inputs: fp32 `[m, K]`.
    """

    kind: str
    weight: Tensor
    coding: Coding
    inputs: Tensor


Products = Callable[[], Iterable[Product]]


@dataclass(frozen=True)
class Choice:
    """The best scale `[K]`, its alpha (None: no scale), its error, and the error without a scale."""

    alpha: float | None
    scale: Tensor
    error: float
    unscaled: float


def weight_profile(products: Iterable[Product]) -> Tensor:
    """How large each input's weights are beside the largest of their group, mean over rows: `[K]`."""
    total: Tensor | float = 0.0
    rows = 0
    for product in products:
        size = product.weight.abs()
        groups = size.reshape(len(size), -1, product.coding.block)
        total = total + (groups / (groups.amax(-1, keepdim=True) + TINY)).reshape(size.shape).sum(0)
        rows += len(size)
    return torch.as_tensor(total) / rows


def scale_of(mean_abs: Tensor, profile: Tensor, alpha: float) -> Tensor:
    """ModelOpt's scale: activations to the alpha over weights to the rest, levelled around 1."""
    scale = (mean_abs.pow(alpha) / (profile.pow(1 - alpha) + TINY)).clamp(*EDGES)
    return scale / (scale.max() * scale.min()).sqrt()


def search(
    products: Products,
    mean_abs: Tensor,
    profile: Tensor,
    absorb: Callable[[Tensor], Tensor],
    alphas: tuple[float, ...] = ALPHAS,
) -> Choice:
    """Try every alpha.

    Args:
        products: Gives the matrices, one at a time; called once.
        mean_abs: `[k]`, of the inputs; k may be less than K where inputs must share scales.
        profile: `[k]`, of the weights.
        absorb: The nearest scale `[K]` to a wanted one `[k]` that the model takes exactly.
        alphas: Which to try.
    """
    scales = {alpha: absorb(scale_of(mean_abs, profile, alpha)) for alpha in alphas}
    candidates: list[tuple[float | None, Tensor]] = [(None, torch.ones_like(scales[alphas[0]]))]
    candidates += scales.items()
    errors: dict[float | None, dict[str, float]] = {alpha: {} for alpha, _ in candidates}
    energies: dict[str, float] = {}
    for product in products():
        kind = product.kind
        energies[kind] = energies.get(kind, 0.0) + float((product.inputs @ product.weight.T).square().sum())
        for alpha, scale in candidates:
            inputs = product.inputs / scale
            for rows in torch.split(product.weight, IN_CACHE):
                error = float((inputs @ rounding_error(rows * scale, product.coding).T).square().sum())
                errors[alpha][kind] = errors[alpha].get(kind, 0.0) + error
    losses = {
        alpha: sum(error / max(energies[kind], TINY) for kind, error in found.items())
        for alpha, found in errors.items()
    }
    best = min(losses, key=losses.__getitem__)  # the first of equals: no scale
    return Choice(best, dict(candidates)[best], losses[best], losses[None])


def rounding_error(weight: Tensor, coding: Coding) -> Tensor:
    """What quantising adds to a weight `[n, K]`, integer coding."""
    groups = Groups.of(weight, 4 if coding.kind == "int4" else 8, coding.block)
    return (groups.errors(1.0) * groups.signs).reshape(weight.shape)


def absorbed_by_norm(stored: Tensor) -> Callable[[Tensor], Tensor]:
    """Scales after which `(w + 1) / s - 1` is a bf16 number, so that the norm loses nothing in a bf16 file.

    Args:
        stored: fp32 `[K]`, the norm's weight w, gamma - 1.
    """
    gamma = stored + 1

    def nearest(scale: Tensor) -> Tensor:
        rounded = (gamma / scale - 1).bfloat16().float() + 1
        possible = gamma / rounded
        near = (possible / scale - 1).abs() < 0.5  # not so where gamma is next to nothing
        return torch.where(near, possible, 1.0)

    return nearest


def shared_by_heads(share: int, head: int) -> Callable[[Tensor], Tensor]:
    """From a scale `[G * d]` of v's rows to `[H * d]`, the same for all query heads of a group."""

    def spread(scale: Tensor) -> Tensor:
        return scale.reshape(-1, 1, head).expand(-1, share, head).reshape(-1)

    return spread


def mean_over_heads(values: Tensor, share: int, head: int) -> Tensor:
    """`[H * d]` to `[G * d]`."""
    return values.reshape(-1, share, head).mean(1).reshape(-1)


def slices(count: int, width: int) -> Iterator[slice]:
    """Rows of a matrix in parts of about 64 MB in fp32, each but the last a multiple of `IN_CACHE`."""
    step = max(IN_CACHE, (16 << 20) // width // IN_CACHE * IN_CACHE)
    for start in range(0, count, step):
        yield slice(start, min(count, start + step))
