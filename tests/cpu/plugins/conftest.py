import pytest

from step35_trt.cpu_library import compile_library


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    out = tmp_path_factory.mktemp("library") / "libstep35_cpu.so"
    compile_library(out)
    return out
