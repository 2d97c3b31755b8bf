"""One kernel with everything fixed that a compiler needs: what is compiled ahead of time, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

Constant = int | float | bool | str | None


@dataclass(frozen=True)
class KernelVariant:
    """A compilation of `function` of a plugin.

    Attributes:
        plugin: Folder under `plugins/`.
        module: File in it, without `.py`.
        function: The `triton.jit` function's name.
        name: Unique within the plugin; how a program's step refers to it.
        signature: Each argument that is no constant, in order, with its Triton type (`*bf16`, `i32`, `fp32`).
        constants: The `tl.constexpr` arguments.
        aligned: Arguments known to be multiples of 16 (pointers, strides).
        num_warps: Warps of a block.
        num_stages: Depth of the software pipeline.
    """

    plugin: str
    module: str
    function: str
    name: str
    signature: Mapping[str, str]
    constants: Mapping[str, Constant]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int
