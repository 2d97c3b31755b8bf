import os
import subprocess
import sys

import onnxruntime as ort
import pytest

from step35_trt import cpu_library
from step35_trt.errors import Step35Error, UnsupportedError
from step35_trt.resources import cache_folder


def test_a_second_time_it_comes_from_the_cache(library, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_library, "_zig", None)
    cpu_library.compile_library(tmp_path / "new" / "again.so")
    assert (tmp_path / "new" / "again.so").read_bytes() == library.read_bytes()


def test_it_registers_and_needs_only_an_old_libc(library):
    ort.SessionOptions().register_custom_ops_library(str(library))
    data = library.read_bytes()
    assert b"RegisterCustomOps" in data
    assert b"GLIBC_2.3" not in data.replace(b"GLIBC_2.3.", b"")
    assert os.fsencode(cpu_library.DATA) not in data


def test_an_unknown_target_is_named(tmp_path):
    with pytest.raises(UnsupportedError, match="riscv64"):
        cpu_library.compile_library(tmp_path / "x.so", "riscv64")


def test_a_failing_compiler_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "plugins" / "cpu").mkdir(parents=True)
    (tmp_path / "plugins" / "cpu" / "bad.c").write_text("int main(void) { return nothing; }\n")
    monkeypatch.setattr(cpu_library, "DATA", tmp_path)
    cpu_library._digest.cache_clear()
    try:
        with pytest.raises(Step35Error, match=r"do not compile: .*nothing") as caught:
            cpu_library.compile_library(tmp_path / "x.so")
        assert "\n" not in str(caught.value)
    finally:
        cpu_library._digest.cache_clear()


def test_a_missing_compiler_is_one_sentence(tmp_path, monkeypatch):
    def missing(name):
        raise cpu_library.PackageNotFoundError(name)

    monkeypatch.setattr(cpu_library, "version", missing)
    cpu_library._digest.cache_clear()
    try:
        with pytest.raises(Step35Error, match="ziglang is missing"):
            cpu_library.compile_library(tmp_path / "x.so")
    finally:
        cpu_library._digest.cache_clear()


def test_the_same_bytes_every_time(library, tmp_path):
    """Compiled anew, with the compiler's own parts as they are: a bundle depends on no place."""
    code = "import sys; from pathlib import Path; from step35_trt.cpu_library import compile_library as c;"
    code += "c(Path(sys.argv[1]))"
    cache = tmp_path / "cache" / cache_folder().name
    cache.mkdir(parents=True)
    (cache / "zig").symlink_to(cache_folder() / "zig")
    environment = os.environ | {"XDG_CACHE_HOME": str(cache.parent)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "new.so")], env=environment, check=True)
    assert len(list(cache.glob("*.so"))) == 1  # it was compiled
    assert (tmp_path / "new.so").read_bytes() == library.read_bytes()
