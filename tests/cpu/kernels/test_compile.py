"""Ahead-of-time compilation: the same bytes everywhere, once, and a sentence where it fails."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from step35_trt.errors import Step35Error, UnsupportedError
from step35_trt.kernels import compile as compiler
from step35_trt.kernels.artefact import CUBIN
from step35_trt.kernels.compile import compile_kernels
from step35_trt.kernels.targets import TARGETS, gpu_target
from tests.cpu.kernels import toys

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.early

HOPPER, SPARK = TARGETS["sm_90"], TARGETS["sm_121"]
SOME = [toys.SCALE, toys.PRODUCT, replace(toys.SCALE, name="half", constants={"BLOCK": 512, "DOUBLE": False})]


def folders(cache: Path) -> list[Path]:
    return [path for path in (cache / "step35-trt" / "kernels").iterdir() if not path.name.startswith(".")]


def test_bytes_depend_on_nothing_of_the_run(
    toy_root: Path, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compile_kernels(SOME, HOPPER, root=toy_root)
    assert len(folders(cached)) >= len(SOME)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("NVPTX_ENABLE_DUMP", "1")
    moved = toys.write(tmp_path / "elsewhere")
    second = compile_kernels(SOME[::-1], HOPPER, root=moved, workers=1)[::-1]
    assert [(k.ptx, k.cubin, k.facts) for k in first] == [(k.ptx, k.cubin, k.facts) for k in second]
    assert {path.name for path in folders(tmp_path / "cache")} <= {path.name for path in folders(cached)}
    for kernel in second:
        for trace in [*toys.traces(), os.fsencode(tmp_path), b".py", b".file", b"\t.loc"]:
            assert trace not in kernel.ptx.encode()
            assert trace not in kernel.cubin
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert {path.name for path in left} == {"kernel.ptx", "kernel.cubin", "kernel.json"}


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("name", TARGETS)
def test_launch_metadata(toy_root: Path, name: str) -> None:
    [kernel] = compile_kernels([toys.SCALE], gpu_target(name), root=toy_root)
    launch = kernel.facts.launch
    assert [(a.name, a.type) for a in launch.arguments] == [
        ("x", "*bf16"),
        ("out", "*fp32"),
        ("n", "i32"),
        ("factor", "fp32"),
        ("global_scratch", "*u8"),
        ("profile_scratch", "*u8"),
    ]
    assert (launch.entry, launch.num_warps, launch.scratch_bytes) == ("scale", 4, 0)
    assert f".target {name}a" in kernel.ptx
    assert f".entry {launch.entry}(" in kernel.ptx
    assert kernel.cubin[:4] == b"\x7fELF"
    assert kernel.facts.resources.registers > 8


def test_a_second_time_nothing_compiles(
    toy_root: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []

    def count(done: int, total: int, name: str) -> None:
        seen.append((done, total))

    copy = replace(toys.SCALE, name="another name")
    first = compile_kernels([toys.SCALE, copy], SPARK, root=toy_root, progress=count)
    assert seen == [(1, 1)]  # equal content compiles once
    assert first[0].cubin == first[1].cubin
    monkeypatch.setattr(compiler, "_Process", None)
    [again] = compile_kernels([toys.SCALE], SPARK, root=toy_root)
    assert again == first[0]
    with pytest.raises(TypeError):  # a change of anything that decides bytes is another kernel
        compile_kernels([replace(toys.SCALE, num_warps=8)], SPARK, root=toy_root)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(empty_cache))
    [folder] = folders(empty_cache)
    whole = (folder / CUBIN).read_bytes()
    (folder / CUBIN).write_bytes(whole[:-1])
    assert compile_kernels([toys.SCALE], SPARK, root=toy_root)[0].cubin == whole
    assert (folder / CUBIN).read_bytes() == whole


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize(
    ("variant", "complaint"),
    [
        (toys.WRONG, "wrong does not compile for sm_90: .*incompatible dimensions"),
        (replace(toys.SCALE, constants={"BLOCK": 1024}), "scale-1024 does not compile .*differ: DOUBLE"),
        (replace(toys.SCALE, function="nothing"), "nothing"),
        (replace(toys.SCALE, module="nowhere"), "toy/nowhere.py does not exist"),
        (replace(toys.SCALE, module="deadly"), "scale-1024 does not compile for sm_90: the compiler stopped"),
    ],
)
def test_a_failure_names_the_kernel(toy_root: Path, variant, complaint: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(Step35Error, match=complaint) as caught:
        compile_kernels([variant, toys.SCALE], HOPPER, root=toy_root, workers=1)
    assert "toy" in caught.value.message
    assert "\n" not in caught.value.message


def test_saved_for_a_runner(toy_root: Path, cached: Path, tmp_path: Path) -> None:
    [kernel] = compile_kernels([toys.SCALE], HOPPER, root=toy_root)
    kernel.save(tmp_path / "out", "scale")
    assert (tmp_path / "out" / "scale.cubin").read_bytes() == kernel.cubin
    done = subprocess.run(
        [toys.assembler(), "--gpu-name=sm_90a", str(tmp_path / "out" / "scale.ptx"), "-o", os.devnull],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert '"scale.ptx"' in (tmp_path / "out" / "scale.json").read_text()


def test_an_unknown_gpu_is_named() -> None:
    with pytest.raises(UnsupportedError, match="sm_75"):
        gpu_target("sm_75")
