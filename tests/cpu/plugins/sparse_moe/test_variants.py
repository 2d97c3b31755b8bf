from __future__ import annotations

import pytest

from step35_trt.config import Step35Config
from step35_trt.kernels import tactics
from step35_trt.kernels import targets as gpu
from step35_trt.kernels.plugin import load
from tests.cpu.plugins.sparse_moe.cases import FORMATS, Geometry, launch
from tests.synthetic import raw_config

module = load("sparse_moe", "variants")
STEP = {"moe_num_experts": 288, "moe_top_k": 8, "hidden_size": 4096, "moe_intermediate_size": 1280}
CONFIG = Step35Config.parse(raw_config(**STEP))
TARGETS = tuple(target.capability for target in gpu.TARGETS.values())


def made(target, shared=False):
    entries = tactics.load("sparse_moe", target)
    return module.variants(CONFIG, target, entries, shared=shared), entries.entries


@pytest.mark.parametrize("target", TARGETS)
def test_names_do_not_repeat_and_arguments_are_the_functions(target):
    found, _ = made(target)
    assert len({v.name for v in found}) == len(found)
    for variant in found:
        names = load(variant.plugin, variant.module).__dict__[variant.function].arg_names
        assert list(variant.signature) == [name for name in names if name in variant.signature]
        assert variant.signature.keys() | variant.constants.keys() == set(names)
        assert not variant.signature.keys() & variant.constants.keys()
        assert variant.constants.get("INTERPRETED", False) is False


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shared", [False, True])
def test_whatever_a_step_launches_is_compiled(target, kind, shared):
    found, entries = made(target, shared)
    names = {v.name for v in found}
    geometry = Geometry(288, 8, 4096, 1280, 3.0, kind, shared)
    for tokens in (1, 2, 16, 17, 64, 256, 257, 1024, 1025, 4096, 65536):
        plan = launch.Plan.of(geometry, entries, tokens, tokens)
        assert plan.few == (tokens <= 16)
        for kernel, tactic in plan.tactics.items():
            tile = plan.tactics["grouped_gate_up"].constants["TOKENS"] if kernel == "place_pairs" else 0
            assert module.name(kernel, geometry, tactic, tile) in names
    assert {"route_logits", "route_selection"} <= names


@pytest.mark.parametrize("target", TARGETS)
def test_tilings_are_what_kernels_take(target):
    for entry in tactics.load("sparse_moe", target).entries:
        block = entry.constants.get("BLOCK_K")
        if block is not None:
            least, most = entry.when["bits"]
            assert least == most
            assert block == 128 if least == 4 else block <= 128
