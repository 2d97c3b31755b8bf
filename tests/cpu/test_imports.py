"""The command line is light: no back end is imported before a command needs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "onnxruntime", "triton", "tensorrt", "tensorrt_rtx", "transformers", "onnx_ir", "onnx")

PROBE = """
import sys
{action}
heavy = [name for name in {heavy!r} if name in sys.modules]
assert not heavy, heavy
"""
HELP = """
from step35_trt import cli
sys.argv = ["step35-trt", {arguments}]
try:
    cli.main()
except SystemExit:
    pass
"""


@pytest.mark.parametrize(
    "action",
    [
        "import step35_trt",
        "from step35_trt import config, checkpoint, model, ops, program, engine, bundle",
        HELP.format(arguments="'--help'"),
        HELP.format(arguments="'generate', '--help'"),
        HELP.format(arguments="'doctor'"),
    ],
)
def test_no_back_end_is_imported(action: str) -> None:
    code = PROBE.format(action=action, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_probe_sees_an_import() -> None:
    code = PROBE.format(action="import onnxruntime", heavy=HEAVY)
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode != 0
