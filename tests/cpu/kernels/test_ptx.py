"""Rearranged entries assemble and take their parameters where a launch puts them."""

from __future__ import annotations

import os
import re
import subprocess
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from step35_trt.errors import Step35Error
from step35_trt.kernels import ptx
from step35_trt.kernels.compile import compile_kernels
from step35_trt.kernels.targets import TARGETS
from tests.cpu.kernels import toys

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("cached")


@pytest.fixture
def source(toy_root: Path, cached: Path) -> str:
    return compile_kernels([toys.SCALE], TARGETS["sm_90"], root=toy_root)[0].ptx


def test_entry(source: str) -> None:
    found = ptx.entry(source)
    assert found.name == "scale"
    assert found.types == ("u64", "u64", "u32", "f32", "u64", "u64")


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations([0, 1, 2, 3]))
def test_another_order_assembles_to_other_offsets(source: str, tmp_path: Path, order: list[int]) -> None:
    text = ptx.arranged(source, [*order[:2], None, *order[2:]], "renamed")
    found, before = ptx.entry(text), ptx.entry(source)
    kept = [parameter for parameter in found.parameters if "unread" not in parameter]
    assert kept == [before.parameters[i] for i in order]
    assert (found.name, found.types[2]) == ("renamed", "u64")
    sizes = {"u64": 8, "u32": 4, "f32": 4}
    offsets, end = {}, 0
    for index in [*order[:2], None, *order[2:]]:
        size = 8 if index is None else sizes[before.types[index]]
        end = -(-end // size) * size
        offsets[index], end = end, end + size
    (tmp_path / "a.ptx").write_text(text)
    cubin = tmp_path / "a.cubin"
    command = [toys.assembler(), "--gpu-name=sm_90a", str(tmp_path / "a.ptx"), "-o", str(cubin)]
    subprocess.run(command, check=True)
    # sm_90 passes parameters in constant bank 0 from 0x210 on; see which are read.
    machine = subprocess.run(
        [os.path.join(os.path.dirname(toys.assembler()), "nvdisasm"), "-c", str(cubin)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    read = {int(place, 16) - 0x210 for place in re.findall(r"c\[0x0\]\[(0x[0-9a-f]+)\]", machine)}
    assert offsets[3] in read  # the factor
    assert offsets[2] in read  # the length


def test_a_parameter_in_use_cannot_be_left_out(source: str) -> None:
    with pytest.raises(Step35Error, match="parameter 3"):
        ptx.arranged(source, [0, 1, 2], "short")


def test_code_that_stops_by_itself_is_seen(source: str) -> None:
    assert not ptx.traps(source)
    assert ptx.traps(source.replace("\tret;", "\ttrap;"))


def test_several_entries_are_refused(source: str) -> None:
    with pytest.raises(Step35Error, match="2 entries"):
        ptx.entry(source + source)
