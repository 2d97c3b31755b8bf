"""One launch of a kernel as data, and who carries it out: Triton's JIT, or machine code made beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from step35_trt.kernels.variant import Constant

# Types of tensors as Triton spells them; torch is not imported for it.
POINTERS = {
    "torch.bfloat16": "*bf16",
    "torch.float16": "*fp16",
    "torch.float32": "*fp32",
    "torch.float8_e4m3fn": "*fp8e4nv",
    "torch.uint8": "*u8",
    "torch.int16": "*i16",
    "torch.int32": "*i32",
    "torch.int64": "*i64",
}


@dataclass(frozen=True)
class KernelLaunch:
    """What a plugin asks for.

    Attributes:
        plugin: Folder under `plugins/`.
        module: File in it, without `.py`.
        function: The kernel.
        grid: One to three numbers of blocks.
        arguments: Those that are no constants, in order.
        constants: The `tl.constexpr` arguments.
        num_warps: Warps of a block.
        num_stages: Depth of the software pipeline.
    """

    plugin: str
    module: str
    function: str
    grid: tuple[int, ...]
    arguments: tuple[Tensor | int | float, ...]
    constants: Mapping[str, Constant]
    num_warps: int
    num_stages: int


class Launcher(Protocol):
    """Carries launches out, in order, on the current stream of the tensors' device; waits for none."""

    @property
    def interpreted(self) -> bool:
        """Whether kernels run in Triton's interpreter, which some of them are told."""
        ...

    def __call__(self, launch: KernelLaunch) -> None:
        """Queue one."""
        ...


def type_of(argument: Tensor | int | float) -> str:
    """Triton's type of what a kernel is given: a pointer, `i32` or `fp32`, which is all that ours take.

    Raises:
        ValueError: a tensor of another type.
    """
    if isinstance(argument, int):
        return "i32"
    if isinstance(argument, float):
        return "fp32"
    try:
        return POINTERS[str(argument.dtype)]
    except KeyError:
        raise ValueError(f"no kernel takes a tensor of {argument.dtype}") from None
