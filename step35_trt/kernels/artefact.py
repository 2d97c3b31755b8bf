"""A compiled kernel: the code, how it is launched and what it costs on the chip."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

if TYPE_CHECKING:
    from pathlib import Path

    from step35_trt.kernels.targets import GpuTarget
    from step35_trt.kernels.variant import KernelVariant

PTX, CUBIN, FACTS = "kernel.ptx", "kernel.cubin", "kernel.json"


class Argument(BaseModel):
    """One parameter of the compiled function, with its Triton type."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    type: str


# What every compiled kernel takes behind its own parameters.
SCRATCH = (Argument(name="global_scratch", type="*u8"), Argument(name="profile_scratch", type="*u8"))


class Launch(BaseModel):
    """How the code is launched; the grid is the caller's.

    Attributes:
        entry: The function's name in PTX and cubin.
        arguments: Its parameters in order. Constants are compiled in and have none; the last two are pointers
            to scratch memory, null unless `scratch_bytes` says otherwise.
        num_warps: Warps of a block, each of 32 threads.
        shared_bytes: Dynamic shared memory of a block.
        scratch_bytes: Global memory per block behind `global_scratch`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    entry: str
    arguments: tuple[Argument, ...]
    num_warps: int
    shared_bytes: int
    scratch_bytes: int


class Resources(BaseModel):
    """What ptxas reports: registers of a thread; bytes of its stack frame and of register spills."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int


class Facts(BaseModel):
    """`kernel.json`, with BLAKE2b digests of the files beside it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    target: str
    triton: str
    launch: Launch
    resources: Resources
    digests: dict[str, str]


@dataclass(frozen=True)
class CompiledKernel:
    """`variant` for `target`.

    Attributes:
        variant: What was compiled.
        target: For which GPU.
        ptx: Assembly for `target`, which a driver can compile.
        cubin: Machine code of exactly `target`.
        facts: How it is launched and what it costs.
    """

    variant: KernelVariant
    target: GpuTarget
    ptx: str
    cubin: bytes
    facts: Facts

    def save(self, folder: Path, stem: str) -> None:
        """Write `{stem}.ptx`, `.cubin` and `.json` for a runner; digests name the files as they are there."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {f"{stem}.ptx": self.ptx.encode(), f"{stem}.cubin": self.cubin}
        for name, data in content.items():
            (folder / name).write_bytes(data)
        facts = self.facts.model_copy(update={"digests": {n: digest(d) for n, d in content.items()}})
        (folder / f"{stem}.json").write_text(facts.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read(folder: Path, variant: KernelVariant, target: GpuTarget) -> CompiledKernel | None:
    """The kernel in a cache folder; None where it is missing or damaged."""
    try:
        facts = Facts.model_validate_json((folder / FACTS).read_bytes())
        content = {name: (folder / name).read_bytes() for name in (PTX, CUBIN)}
    except (OSError, ValidationError):
        return None
    if facts.digests != {name: digest(data) for name, data in content.items()}:
        return None
    return CompiledKernel(variant, target, content[PTX].decode(), content[CUBIN], facts)


def digest(data: bytes) -> str:
    """BLAKE2b, 32 bytes, hexadecimal: the bundle's digest."""
    return hashlib.blake2b(data, digest_size=32).hexdigest()
