from __future__ import annotations

import pytest

from step35_trt.config import Step35Config
from step35_trt.errors import UnsupportedError
from step35_trt.kernels import tactics
from step35_trt.kernels import targets as gpu
from step35_trt.kernels.plugin import load
from tests.cpu.plugins.gated_attention.cases import Geometry, layer
from tests.synthetic import raw_config

variants = load("gated_attention", "variants").variants
geometry = load("gated_attention", "geometry")
TARGETS = tuple(target.capability for target in gpu.TARGETS.values())


@pytest.fixture(scope="module")
def step35():
    raw = raw_config(heads=(64, 96), groups=8, head_dim=128, sliding_window=512)
    return Step35Config.parse(raw)


@pytest.mark.parametrize("target", TARGETS)
def test_each_kernel_of_both_kinds_of_layer(step35, target):
    found = variants(step35, target, tactics.load("gated_attention", target))
    names = [v.name for v in found]
    assert len(set(names)) == len(names)
    for kind in ("full-64x8x128", "window512-96x8x128"):
        for pages in ("bf16", "fp8"):
            for kernel in ("prepare", "decode", "prefill"):
                assert f"{kernel}-{kind}-{pages}-sm_{target}" in names


@pytest.mark.parametrize("target", TARGETS)
def test_arguments_are_the_functions(step35, target):
    for variant in variants(step35, target, tactics.load("gated_attention", target)):
        function = getattr(load(variant.plugin, variant.module), variant.function)
        order = [name for name in function.arg_names if name not in variant.constants]
        assert list(variant.signature) == order
        assert set(variant.constants) < set(function.arg_names)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_tiles_fit_pages_and_splits(target, groups):
    """What kernels take for granted of a tactic."""
    entries = tactics.load("gated_attention", target).entries
    for spec in (layer(8 * groups, groups, 128, 0, 64), layer(12 * groups, groups, 128, 512, 128)):
        shape = Geometry.of(spec, 1e-5, 4)
        decode = geometry.tactic(entries, "decode", shape, 16).constants
        reduce = geometry.tactic(entries, "reduce", shape, 16).constants
        prefill = geometry.tactic(entries, "prefill", shape, 16).constants
        for block in (decode["BLOCK_N"], prefill["BLOCK_N"]):
            assert shape.page % block == 0
        assert decode["LEAST"] % decode["BLOCK_N"] == 0
        assert decode["SPLITS"] % reduce["AT_ONCE"] == 0
        assert shape.share % prefill["HEADS"] == 0
        rows = prefill["TOKENS"] * prefill["HEADS"]
        assert rows & (rows - 1) == 0


def test_a_geometry_without_a_tactic_is_refused():
    entries = tactics.load("gated_attention", 90).entries
    with pytest.raises(UnsupportedError, match="prefill"):
        geometry.tactic(entries, "prefill", Geometry(10, 2, 128, 0, 64, 1e-5), 16)
