"""Small Triton kernels in a plugin folder of their own, for what compiles and reports kernels."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from step35_trt.kernels.variant import KernelVariant

if TYPE_CHECKING:
    from pathlib import Path

KERNELS = """
import triton
import triton.language as tl

from .steps import twice


@triton.jit
def scale(x, out, n, factor, BLOCK: tl.constexpr, DOUBLE: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n).to(tl.float32) * factor
    if DOUBLE:
        value = twice(value)
    tl.store(out + i, value, mask=i < n)


@triton.jit
def product(a, b, out, K: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    rows, columns, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, 64)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, K, 64):
        left = tl.load(a + rows[:, None] * K + start + k[None])
        total = tl.dot(left, tl.load(b + columns[None] * K + start + k[:, None]), total)
    tl.store(out + rows[:, None] * N + columns[None], total.to(tl.bfloat16))


@triton.jit
def wrong(x, out):
    tl.store(out, tl.load(x) + tl.arange(0, 8) + tl.arange(0, 16))
"""
STEPS = """
import triton


@triton.jit
def twice(x):
    return x * 2.0
"""
# The compiler refuses to assemble, or takes the process with it.
DEADLY = """
import os

os._exit(7)
"""

SCALE = KernelVariant(
    plugin="toy",
    module="kernels",
    function="scale",
    name="scale-1024",
    signature={"x": "*bf16", "out": "*fp32", "n": "i32", "factor": "fp32"},
    constants={"BLOCK": 1024, "DOUBLE": True},
    aligned=("x", "out", "n"),
    num_warps=4,
    num_stages=1,
)
PRODUCT = KernelVariant(
    plugin="toy",
    module="kernels",
    function="product",
    name="product-64",
    signature={"a": "*bf16", "b": "*bf16", "out": "*bf16"},
    constants={"K": 512, "M": 64, "N": 64},
    aligned=("a", "b", "out"),
    num_warps=4,
    num_stages=3,
)
SPILLING = replace(PRODUCT, name="product-256", constants={"K": 512, "M": 256, "N": 128})
LARGE = replace(PRODUCT, name="product-deep", constants={"K": 512, "M": 128, "N": 128}, num_stages=5)
WRONG = replace(SCALE, function="wrong", name="wrong", signature={"x": "*fp32", "out": "*fp32"}, constants={})
WRONG = replace(WRONG, aligned=())


def write(root: Path) -> Path:
    """The plugin `toy` under `root`."""
    folder = root / "toy"
    folder.mkdir(parents=True)
    for name, text in (("kernels", KERNELS), ("steps", STEPS), ("deadly", DEADLY), ("other", "")):
        (folder / f"{name}.py").write_text(text)
    return root


def assembler() -> str:
    """ptxas of the Triton wheel."""
    import triton

    return os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "ptxas")


def traces() -> list[bytes]:
    """What would show that a file was made on this machine."""
    import tempfile

    return [
        os.fsencode(path)
        for path in (os.getcwd(), tempfile.gettempdir(), sys.prefix, os.path.expanduser("~"))
    ]
