"""Compiled kernels are launched as Triton would launch them, and without it."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step35_trt.errors import CorruptInputError, UnsupportedError
from step35_trt.kernels.artefact import SCRATCH, Argument, Launch
from step35_trt.kernels.compile import compile_kernels
from step35_trt.kernels.cubins import Cubin, CubinLauncher, open_cubins
from step35_trt.kernels.launching import KernelLaunch
from step35_trt.kernels.targets import TARGETS
from tests.cpu.kernels import launched, toys
from tests.gpu_kernels import SHARED, uncompiled

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from step35_trt.kernels.variant import KernelVariant
    from step35_trt.program import KernelFile

HOPPER = TARGETS["sm_90"]
MEND = "Remove it and build it again."
Kernels = dict[str, "list[KernelVariant]"]
Lines = list[tuple[dict[str, Any], dict[str, Any]]]


def python(module: str, text: str = "") -> list[dict[str, Any]]:
    """What a test's program prints, in a process where kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", f"tests.cpu.kernels.{module}"]
    done = subprocess.run(
        command, input=text, env=environment, capture_output=True, text=True, check=False, cwd=os.getcwd()
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def lines() -> Lines:
    """Launches of small models' steps, and what Triton says to each."""
    asked = python("launched")
    said = python("triton_launches", "".join(json.dumps(line) + "\n" for line in asked))
    return list(zip(asked, said, strict=True))


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return {recipe: launched.deployment(recipe, *rest).kernels() for recipe, *rest in launched.ENGINES}


def test_every_kernel_is_met(lines: Lines, kernels: Kernels) -> None:
    """So what follows speaks of all of them; routing from logits is not what a session does."""
    met = {(asked["plugin"], asked["function"]) for asked, _ in lines}
    every = {(v.plugin, v.function) for variants in kernels.values() for v in variants}
    assert met == every - {("sparse_moe", "route_logits")}


def test_parameters_are_those_of_triton_s_launcher(lines: Lines) -> None:
    for asked, said in lines:
        got, slots = asked["got"], [bytes.fromhex(value) for value in said["parameters"]]
        assert got["parameters"] == b"".join(value.ljust(8, b"\0") for value in slots).hex()
        assert got["threads"] == said["threads"]
        assert got["grid"] == (asked["grid"] + [1, 1])[:3]
        assert got["stream"] == launched.STREAM


def test_types_and_alignment_are_what_triton_would_compile_for(lines: Lines) -> None:
    """A whole number that is 1 is a constant to it, which ours are not."""
    for asked, said in lines:
        for (kind, value), theirs, aligned in zip(
            asked["arguments"], said["types"], said["aligned"], strict=True
        ):
            assert theirs == ("constexpr" if kind == "i32" and value == 1 else kind)
            assert aligned or not kind.startswith("*")


def test_the_code_is_that_of_the_launch(lines: Lines, kernels: Kernels) -> None:
    """Each kernel was given shared memory of its own size, so the launch has the right one's."""
    for asked, _ in lines:
        variants = kernels[asked["recipe"]]
        [place] = [i for i, v in enumerate(variants) if v.name == asked["got"]["code"]]
        assert asked["got"]["shared_bytes"] == SHARED + place
        found = variants[place]
        assert dict(found.constants) == asked["constants"]
        assert list(found.signature.values()) == [kind for kind, _ in asked["arguments"]]
        assert (found.function, found.num_warps, found.num_stages) == (
            asked["function"],
            asked["num_warps"],
            asked["num_stages"],
        )


def test_parameters_are_those_of_the_machine_code(toy_root: Path, cached: Path, tmp_path: Path) -> None:
    """As the driver finds them described in a cubin: their places and sizes, the scratch pointers last."""
    [kernel] = compile_kernels([toys.SCALE], HOPPER, root=toy_root)
    code = tmp_path / "scale.cubin"
    code.write_bytes(kernel.cubin)
    tool = os.path.join(os.path.dirname(toys.assembler()), "cuobjdump")
    listed = subprocess.run([tool, "-elf", str(code)], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Ordinal : 0x(\w+)\s+Offset  : 0x(\w+)\s+Size    : 0x(\w+)", listed)
    sizes = [size for _, _, size in sorted(tuple(int(x, 16) for x in one) for one in found)]
    assert sizes == [8, 8, 4, 4, 8, 8]
    packed = Cubin.of(toys.SCALE, kernel.facts.launch, 0).parameters
    assert re.findall(r"Q|i4x|f4x", packed.format) == ["Q", "Q", "i4x", "f4x", "Q", "Q"]


NUMBERS = {
    "i32": st.integers(-(1 << 31), (1 << 31) - 1),
    "fp32": st.floats(width=32, allow_nan=False),
    "*bf16": st.integers(0, (1 << 60) - 1).map(lambda x: 16 * x),
}
READ = {"i32": ctypes.c_int32, "fp32": ctypes.c_float, "*bf16": ctypes.c_uint64}


class Address:
    """A tensor that lies somewhere."""

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


def cubin_of(kinds: list[str]) -> Cubin:
    signature = {f"a{i}": kind for i, kind in enumerate(kinds)}
    aligned = tuple(name for name, kind in signature.items() if kind.startswith("*"))
    variant = replace(toys.SCALE, signature=signature, aligned=aligned)
    arguments = (*(Argument(name=name, type=kind) for name, kind in signature.items()), *SCRATCH)
    launch = Launch(entry="k", arguments=arguments, num_warps=1, shared_bytes=0, scratch_bytes=0)
    return Cubin.of(variant, launch, 0)


@given(st.lists(st.sampled_from(sorted(NUMBERS)), max_size=12), st.data())
def test_a_driver_reads_what_was_given(kinds: list[str], data: st.DataObject) -> None:
    numbers = [data.draw(NUMBERS[kind]) for kind in kinds]
    given_ = [Address(x) if kind.startswith("*") else x for kind, x in zip(kinds, numbers, strict=True)]
    packed = cubin_of(kinds).packed(given_)  # type: ignore[arg-type]
    assert len(packed) == 8 * (len(kinds) + len(SCRATCH))
    for i, (kind, number) in enumerate(zip(kinds, numbers, strict=True)):
        assert READ[kind].from_buffer_copy(packed, 8 * i).value == number
    assert not any(packed[8 * len(kinds) :])


@given(st.integers(1, 15), st.integers(0, 1 << 40))
def test_what_is_not_aligned_is_refused(beside: int, times: int) -> None:
    cubin, address = cubin_of(["i32", "*bf16"]), Address(16 * times + beside)
    with pytest.raises(ValueError, match="scale-1024 takes a1 at a multiple of 16 bytes"):
        cubin.packed([1, address])  # type: ignore[list-item]


def test_a_number_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be given"):
        cubin_of(["i32"]).packed([1 << 31])


@pytest.fixture
def files(tmp_path: Path) -> list[KernelFile]:
    return launched.written(tmp_path, uncompiled([toys.SCALE], HOPPER))


def opened(
    folder: Path, files: list[KernelFile], target: str = "sm_90", **changes: Any
) -> tuple[CubinLauncher, launched.WritingDriver]:
    driver = launched.WritingDriver()
    variants = [replace(toys.SCALE, **changes)]
    return open_cubins(folder, files, variants, TARGETS[target], driver, lambda: 7, MEND), driver


def ask(tokens: int = 3, **constants: Any) -> KernelLaunch:
    x, out = torch.zeros(8, dtype=torch.bfloat16), torch.zeros(8)
    fixed = dict(toys.SCALE.constants) | constants
    return KernelLaunch("toy", "kernels", "scale", (tokens,), (x, out, 16, 0.5), fixed, 4, 1)


def test_a_kernel_is_loaded_once_and_launched(tmp_path: Path, files: list[KernelFile]) -> None:
    launcher, driver = opened(tmp_path, files)
    assert driver.loaded == [(b"scale-1024", "scale", SHARED)]
    for tokens in (3, 0, 2):
        launcher(ask(tokens))
    assert [(one["grid"], one["threads"], one["stream"]) for one in driver.launched] == [
        ((3, 1, 1), 128, 7),
        ((2, 1, 1), 128, 7),
    ]
    assert len(driver.loaded) == 1
    with pytest.raises(UnsupportedError, match=r"no compiled kernel toy/scale \(\*bf16, \*fp32, i32, fp32\)"):
        launcher(ask(BLOCK=512))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"name": "other"}, "has no kernel toy/other, which this version launches"),
        ({"constants": {"BLOCK": 512}}, "toy/scale-1024 was compiled for other constants"),
        ({"signature": {"x": "*bf16"}}, "other arguments"),
        ({"target": "sm_121"}, "other GPU .*sm_90"),
    ],
)
def test_what_a_bundle_lacks_is_said_when_it_opens(
    tmp_path: Path, files: list[KernelFile], changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UnsupportedError, match=complaint) as caught:
        opened(tmp_path, files, **changes)
    assert caught.value.hint == MEND


def spoil_code(folder: Path, file: KernelFile) -> None:
    (folder / file.code).write_bytes(b"another")


def spoil_facts(folder: Path, file: KernelFile) -> None:
    (folder / file.launch).write_text("{}")


def wants_scratch(folder: Path, file: KernelFile) -> None:
    text = (folder / file.launch).read_text()
    (folder / file.launch).write_text(text.replace('"scratch_bytes":0', '"scratch_bytes":64'))


@pytest.mark.parametrize(
    ("spoil", "kind", "complaint"),
    [
        (spoil_code, CorruptInputError, "is not the code that"),
        (spoil_facts, CorruptInputError, "is damaged"),
        (wants_scratch, UnsupportedError, "other scratch memory"),
    ],
)
def test_files_that_contradict_themselves(
    tmp_path: Path,
    files: list[KernelFile],
    spoil: Callable[[Path, KernelFile], None],
    kind: type[Exception],
    complaint: str,
) -> None:
    spoil(tmp_path, files[0])
    with pytest.raises(kind, match=complaint):
        opened(tmp_path, files)
