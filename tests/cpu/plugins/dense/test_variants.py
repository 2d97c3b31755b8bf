"""Whatever dense algebra is launched was compiled, and as its kernels are written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from step35_trt.kernels.cubins import Specialisation
from step35_trt.kernels.plugin import load

if TYPE_CHECKING:
    from step35_trt.kernels.launching import KernelLaunch

launch, variants = load("dense", "launch"), load("dense", "variants")
pack, kept = load("sparse_moe", "pack"), load("sparse_moe", "weights")
FORMATS = ("int4", "fp8_channel", "fp8_block")
N, K, WIDTH, EPS = 48, 256, 96, 1e-5
MADE = variants.variants([(N, K, kind) for kind in FORMATS], [(K, EPS)], [WIDTH])


class Noted:
    """`Launcher` of compiled kernels that launches nothing."""

    interpreted = False

    def __init__(self) -> None:
        self.launches: list[KernelLaunch] = []

    def __call__(self, asked: KernelLaunch) -> None:
        self.launches.append(asked)


def test_arguments_are_the_functions() -> None:
    assert len({variant.name for variant in MADE}) == len(MADE)
    for variant in MADE:
        function = getattr(load(variant.plugin, variant.module), variant.function)
        order = [name for name in function.arg_names if name not in variant.constants]
        assert list(variant.signature) == order
        assert variant.signature.keys() | variant.constants.keys() == set(function.arg_names)


@given(st.integers(1, 400), st.sampled_from(FORMATS))
def test_whatever_is_launched_is_compiled(tokens: int, kind: Any) -> None:
    noted, types = Noted(), kept.DTYPES[kind]
    shapes = pack.shapes(kind, N, K)
    matrix = kept.Matrix(*(torch.empty(1, *s, dtype=t) for s, t in zip(shapes, types, strict=True)))
    x = torch.empty(tokens, K, dtype=torch.bfloat16)
    launch.linear(x, matrix, kind, (N, K), noted)
    launch.rms_norm(x, torch.empty(K), EPS, noted)
    launch.swiglu(x[:, :WIDTH], x[:, -WIDTH:], 0.0, noted)
    made = {Specialisation.of(variant) for variant in MADE}
    assert len(noted.launches) == 3
    assert {Specialisation.asked(asked) for asked in noted.launches} <= made
    blocks, constants = noted.launches[0].grid, noted.launches[0].constants
    covered = [count * constants[size] for count, size in zip(blocks, ("ROWS", "TOKENS"), strict=False)]
    assert covered[0] >= N
    assert (covered[1] if len(covered) > 1 else constants["TOKENS"]) >= tokens


def test_nothing_is_launched_for_nothing() -> None:
    noted, nothing = Noted(), torch.empty(0, 8)
    assert launch.swiglu(nothing, nothing, 1.0, noted).shape == (0, 8)
    assert launch.rms_norm(nothing, torch.empty(8), EPS, noted).shape == (0, 8)
    assert noted.launches == []
