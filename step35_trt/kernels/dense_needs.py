"""What dense algebra a model's segments ask kernels for: known before any weight is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from step35_trt.gpu_forms import kernel_format

if TYPE_CHECKING:
    from collections.abc import Iterable

    from step35_trt.lower import ModelPrograms
    from step35_trt.program import ExpertFormat


@dataclass(frozen=True)
class DenseNeeds:
    """The distinct shapes; `plugins/dense/variants.py` makes compilations of them.

    Attributes:
        products: Output features, input features and coding of matrices that kernels multiply by. Those that
            are stored plain, or coded as no kernel takes them, are multiplied by torch.
        norms: Width and epsilon.
        gates: Widths.
    """

    products: tuple[tuple[int, int, ExpertFormat], ...]
    norms: tuple[tuple[int, float], ...]
    gates: tuple[int, ...]

    @classmethod
    def of(cls, models: Iterable[ModelPrograms]) -> DenseNeeds:
        """Of all segments of some programs together, in order."""
        products: set[tuple[int, int, ExpertFormat]] = set()
        norms: set[tuple[int, float]] = set()
        gates: set[int] = set()
        for made in models:
            for call in (call for segment in made.segments.values() for call in segment.calls):
                if call.word == "linear":
                    weight = call.arguments[1]
                    assert isinstance(weight, str)
                    form = made.forms(weight)
                    kind = kernel_format(form)
                    if kind is not None:
                        products.add((form.shape[0], form.shape[1], kind))
                elif call.word == "rms_norm":
                    eps = call.arguments[2]
                    assert isinstance(eps, float)
                    norms.add((call.result.type.width, eps))
                elif call.word == "swiglu":
                    gates.add(call.result.type.width)
        return cls(tuple(sorted(products)), tuple(sorted(norms)), tuple(sorted(gates)))
