"""Steps against an independent study of this model's rooflines, within 2 %, and against arithmetic by hand.

The study ("Anchors", sections 5.1, 5.3 and 5.4, 21 November 2026) counts FP8 caches, a router and an
embedding in BF16, and one machine of the bandwidth of all; formats here are spelled as there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step35_trt.engine import EngineSpec
from step35_trt.hardware import Hardware
from step35_trt.plan.memory import Footprint
from step35_trt.plan.roofline import Roofline, distinct_experts, expected_tokens
from step35_trt.plan.splits import Shares
from step35_trt.plan.weight_cost import BF16, FP8_BLOCKS, FP8_ROWS, INT4_128, NVFP4, CostOf, WeightCost

if TYPE_CHECKING:
    from step35_trt.config import Step35Config
    from step35_trt.plan.parameters import Group, Parameter

K = 1024


def format_of(rest: WeightCost, head: WeightCost, **groups: WeightCost) -> CostOf:
    """Groups in their coding, everything else in `rest`, what stays in BF16 in BF16."""
    spelled: dict[Group, WeightCost] = {
        "routed experts": groups["experts"],
        "dense MLP": groups.get("dense", rest),
        "shared expert": groups.get("shared", rest),
        "MTP body": groups.get("modules", rest),
        "head": head,
        "MTP head": head,
        "router": BF16,
        "embedding": BF16,
    }

    def form(parameter: Parameter) -> WeightCost:
        return spelled.get(parameter.group, rest) if len(parameter.shape) > 1 else BF16

    return form


FORMATS = {
    "official FP8": format_of(BF16, BF16, experts=FP8_BLOCKS),
    "FP8": format_of(FP8_ROWS, FP8_ROWS, experts=FP8_ROWS),
    "INT4 experts, FP8": format_of(FP8_ROWS, FP8_ROWS, experts=INT4_128),
    "INT4": format_of(INT4_128, FP8_ROWS, experts=INT4_128),
    "NVFP4 MLPs, BF16": format_of(BF16, BF16, experts=NVFP4, dense=NVFP4),
}

# Format, hardware, bandwidth in GB/s; GB read and tokens per second of 1, 8 and 64 sequences of 8K.
DECODING = [
    ("official FP8", "h200", 9600, (17.9, 52.6, 186), (537, 1459, 3296)),
    ("official FP8", "h200", 4800, (17.9, 52.6, 186), (269, 730, 1648)),
    ("FP8", "h200", 9600, (11.7, 46.5, 180), (817, 1651, 3408)),
    ("FP8", "h200", 4800, (11.7, 46.5, 180), (409, 826, 1704)),
    ("INT4 experts, FP8", "h200", 4800, (9.2, 27.9, 103), (523, 1376, 2975)),
    ("INT4", "h200", 4800, (6.5, 25.2, 100.5), (741, 1524, 3055)),
    ("FP8", "dgx-spark", 273, None, (23, 47, 97)),
    ("INT4 experts, FP8", "dgx-spark", 273, None, (29.7, 78, 169)),
    ("INT4 experts, FP8", "dgx-spark", 210, None, (22.9, 60, 130)),
    ("INT4", "dgx-spark", 273, None, (42.2, 87, 174)),
    ("INT4", "dgx-spark", 210, None, (32.4, 67, 134)),
    ("NVFP4 MLPs, BF16", "dgx-spark", 273, None, (18.2, 62, 150)),
]


def roofline(
    config: Step35Config, cost_of: CostOf, hardware: str, bandwidth: float | None = None, devices: int = 1
) -> Roofline:
    machine = Hardware.load(hardware)
    spec = EngineSpec(name="x", summary="", target="tensorrt", hardware=machine, devices=devices, recipe="")
    shares = Shares.of(config, spec.parallelism, devices, cost_of)
    footprint = Footprint.of(config, spec, cost_of, shares, kv_bytes=1)
    return Roofline.of(footprint, bandwidth or machine.bandwidth)


@pytest.mark.parametrize(("name", "hardware", "bandwidth", "gigabytes", "rates"), DECODING)
def test_decoding(
    step35: Step35Config,
    name: str,
    hardware: str,
    bandwidth: float,
    gigabytes: tuple[float, ...] | None,
    rates: tuple[float, ...],
) -> None:
    roof = roofline(step35, FORMATS[name], hardware, bandwidth * 1e9)
    steps = [roof.step(sequences, 8 * K, 0, ()) for sequences in (1, 8, 64)]
    assert [step.tokens_per_second for step in steps] == pytest.approx(rates, rel=0.02)
    assert all(step.memory_seconds > step.arithmetic_seconds for step in steps)
    if gigabytes:
        assert [step.traffic.total / 1e9 for step in steps] == pytest.approx(gigabytes, rel=0.02)


@pytest.mark.parametrize(("hardware", "rates"), [("h200", (453, 980, 1588)), ("dgx-spark", (25.8, 56, 90))])
def test_long_contexts(step35: Step35Config, hardware: str, rates: tuple[float, ...]) -> None:
    roof = roofline(step35, FORMATS["INT4 experts, FP8"], hardware)
    got = [roof.step(sequences, 64 * K, 0, ()).tokens_per_second for sequences in (1, 8, 64)]
    assert got == pytest.approx(rates, rel=0.02)


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        ("official FP8", 203.7),
        ("FP8", 197.6),
        ("INT4 experts, FP8", 105.4),
        ("INT4", 102.7),
        ("NVFP4 MLPs, BF16", 119.8),
    ],
)
def test_what_fits(step35: Step35Config, name: str, gigabytes: float) -> None:
    weights = roofline(step35, FORMATS[name], "h200").footprint.weights
    main = sum(w.nbytes for w in weights if not w.group.startswith("MTP"))
    assert main / 1e9 == pytest.approx(gigabytes, rel=0.002)


def test_costs_of_drafting(step35: Step35Config) -> None:
    """One sequence, next to no context: a round relative to a plain step."""
    roof = roofline(step35, FORMATS["INT4 experts, FP8"], "h200")
    plain = roof.step(1, 1, 0, ()).seconds
    costs = [roof.step(1, 1, drafts, ()).seconds / plain for drafts in (1, 2, 3)]
    assert costs == pytest.approx([1.39, 1.76, 2.14], rel=0.02)


@pytest.mark.parametrize(
    ("name", "acceptance", "gains"),
    [
        ("INT4 experts, FP8", (0.75, 0.60, 0.50), (1.26, 1.25, 1.14)),
        ("INT4 experts, FP8", (0.85, 0.75, 0.65), (1.33, 1.41, 1.36)),
        ("INT4 experts, FP8", (0.90, 0.85, 0.80), (1.37, 1.51, 1.53)),
        ("INT4", (0.85, 0.75, 0.65), (1.21, 1.21, 1.13)),
    ],
)
def test_gains_of_drafting(
    step35: Step35Config, name: str, acceptance: tuple[float, ...], gains: tuple[float, ...]
) -> None:
    roof = roofline(step35, FORMATS[name], "h200")
    plain = roof.step(1, 1, 0, acceptance).tokens_per_second
    got = [roof.step(1, 1, drafts, acceptance).tokens_per_second / plain for drafts in (1, 2, 3)]
    assert got == pytest.approx(gains, rel=0.02)


def test_distinct_experts() -> None:
    """Section 5.1 of the study."""
    want = {1: 8, 2: 15.8, 3: 23.3, 4: 30.7, 8: 58.1, 16: 104.5, 32: 171, 64: 240.5, 256: 287.8}
    got = {n: distinct_experts(288, 8, n) for n in want}
    assert got == pytest.approx(want, rel=0.003)


@given(st.lists(st.floats(0, 1), max_size=3), st.integers(0, 3))
def test_tokens_of_a_round(acceptance: list[float], drafts: int) -> None:
    tokens = expected_tokens(acceptance, drafts)
    assert 1 <= tokens <= 1 + min(drafts, len(acceptance))
    assert expected_tokens([1.0] * 3, drafts) == 1 + drafts
    assert expected_tokens([0.0, 1.0, 1.0], drafts) == 1  # nothing after a wrong draft counts


def test_devices_divide_the_time(step35: Step35Config) -> None:
    """Two H200 come near to one of twice the bandwidth; routers and sums over the link are missing."""
    cost_of = FORMATS["FP8"]
    two, twice = roofline(step35, cost_of, "h200", devices=2), roofline(step35, cost_of, "h200", 9.6e12)
    for sequences in (1, 8, 64):
        shared, ideal = two.step(sequences, 8 * K, 0, ()), twice.step(sequences, 8 * K, 0, ())
        assert ideal.seconds < shared.seconds < 1.02 * ideal.seconds
        # 45 layers, twice, a row of 4096 bf16 a token, half of it out and half of it back, at 450 GB/s.
        assert shared.link_seconds == pytest.approx(sequences * 45 * 2 * 4096 * 2 / 450e9)
        assert ideal.link_seconds == 0


def test_arithmetic_bounds_large_batches(step35: Step35Config) -> None:
    """A machine that reads anything at once is left with its multiply-adds: 2 x 11.46 billion a token."""
    roof = roofline(step35, FORMATS["official FP8"], "h200", 1e20)
    step = roof.step(100, 1, 0, ())
    experts, rest = 2 * 5_284_823_040, 2 * (11_459_365_952 - 5_284_823_040)
    keys = 4 * 128 * (12 * 64 + 33 * 96)
    want = 100 * (experts / 1979e12 + (rest + keys) / 989e12)
    assert step.seconds == step.arithmetic_seconds == pytest.approx(want, rel=1e-4)


def test_drafting_reads_its_modules(step35: Step35Config) -> None:
    roof = roofline(step35, FORMATS["FP8"], "h200")
    modules = sum(w.nbytes for w in roof.footprint.weights if w.group.startswith("MTP"))
    window = 2 * 8 * 128 * 512
    for drafts in range(4):
        drafting = roof.step(5, 8 * K, drafts, ()).traffic.drafting
        assert drafting == pytest.approx(drafts * (modules / 3 + 5 * window))
