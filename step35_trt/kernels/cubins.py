"""Kernels of a bundle: machine code compiled beforehand, found by what it was compiled for.

A kernel's parameters are its arguments in order, without the constants, and then two pointers to scratch
memory (`artefact.SCRATCH`), which none of ours uses; PTX and signature were compared when it was compiled.
Nothing here needs Triton or a compiler.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import ValidationError

from step35_trt.errors import CorruptInputError, UnsupportedError
from step35_trt.kernels.artefact import SCRATCH, Facts, digest
from step35_trt.kernels.launching import type_of
from step35_trt.kernels.targets import WARP

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from torch import Tensor

    from step35_trt.kernels.artefact import Launch
    from step35_trt.kernels.driver import Driver
    from step35_trt.kernels.launching import KernelLaunch
    from step35_trt.kernels.targets import GpuTarget
    from step35_trt.kernels.variant import Constant, KernelVariant
    from step35_trt.program import KernelFile

ALIGNED = 16  # bytes that an address is a multiple of where the code was compiled to rely on it
# A parameter in its slot of eight bytes (`driver.SLOT`), by Triton's type.
PACKED = {"i32": "i4x", "fp32": "f4x"}


@dataclass(frozen=True)
class Specialisation:
    """What decides which machine code a launch takes."""

    plugin: str
    function: str
    types: tuple[str, ...]
    constants: frozenset[tuple[str, Constant]]
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, variant: KernelVariant) -> Specialisation:
        """Of a compilation."""
        return cls(
            variant.plugin,
            variant.function,
            tuple(variant.signature.values()),
            frozenset(variant.constants.items()),
            variant.num_warps,
            variant.num_stages,
        )

    @classmethod
    def asked(cls, launch: KernelLaunch) -> Specialisation:
        """Of a launch."""
        return cls(
            launch.plugin,
            launch.function,
            tuple(map(type_of, launch.arguments)),
            frozenset(launch.constants.items()),
            launch.num_warps,
            launch.num_stages,
        )


@dataclass(frozen=True)
class Cubin:
    """A loaded kernel.

    Attributes:
        variant: What it was compiled as.
        launch: How it is launched.
        function: The driver's handle.
        parameters: Packs them, the scratch pointers included.
        aligned: Which arguments are addresses that have to be multiples of `ALIGNED`.
    """

    variant: KernelVariant
    launch: Launch
    function: int
    parameters: struct.Struct
    aligned: tuple[int, ...]

    @classmethod
    def of(cls, variant: KernelVariant, launch: Launch, function: int) -> Cubin:
        """Of a loaded function."""
        kinds = [PACKED.get(argument.type, "Q") for argument in launch.arguments]
        places = tuple(i for i, name in enumerate(variant.signature) if name in variant.aligned)
        return cls(variant, launch, function, struct.Struct("<" + "".join(kinds)), places)

    def packed(self, arguments: Sequence[Tensor | int | float]) -> bytes:
        """The parameters of a launch with these arguments.

        Raises:
            ValueError: an address is not aligned as the code relies on, or a number has no room.
        """
        values = [x if isinstance(x, int | float) else x.data_ptr() for x in arguments]
        for place in self.aligned:
            if values[place] % ALIGNED:
                raise ValueError(
                    f"{self.variant.name} takes {list(self.variant.signature)[place]} at a multiple of "
                    f"{ALIGNED} bytes, not at {values[place]:#x}"
                )
        try:
            return self.parameters.pack(*values, *[0] * len(SCRATCH))
        except struct.error as error:
            raise ValueError(f"{self.variant.name} cannot be given {values}: {error}") from None


@dataclass(frozen=True)
class CubinLauncher:
    """`Launcher` of a bundle's kernels on one device.

    Attributes:
        driver: The device's.
        stream: Gives the handle of the stream that work is queued on now.
        kernels: All that were loaded.
    """

    driver: Driver
    stream: Callable[[], int]
    kernels: dict[Specialisation, Cubin] = field(repr=False)

    @property
    def interpreted(self) -> bool:
        """See `Launcher`."""
        return False

    def __call__(self, launch: KernelLaunch) -> None:
        """See `Launcher`.

        Raises:
            UnsupportedError: no kernel was compiled for it.
            ValueError: an argument is not what the kernel was compiled for.
        """
        asked = Specialisation.asked(launch)
        kernel = self.kernels.get(asked)
        if kernel is None:
            fixed = ", ".join(f"{name} {value}" for name, value in launch.constants.items())
            raise UnsupportedError(
                f"there is no compiled kernel {launch.plugin}/{launch.function} ({', '.join(asked.types)}) "
                f"for {fixed}"
            )
        if 0 in launch.grid:
            return
        x, y, z = (*launch.grid, 1, 1)[:3]
        threads, shared = kernel.launch.num_warps * WARP, kernel.launch.shared_bytes
        parameters = kernel.packed(launch.arguments)
        self.driver.launch(kernel.function, (x, y, z), threads, shared, self.stream(), parameters)


def open_cubins(
    directory: Path,
    files: Iterable[KernelFile],
    variants: Sequence[KernelVariant],
    target: GpuTarget,
    driver: Driver,
    stream: Callable[[], int],
    mend: str,
) -> CubinLauncher:
    """Load all kernels that may be launched, before anything is.

    Args:
        directory: The bundle.
        files: What it has.
        variants: What is wanted of it.
        target: The GPU's.
        driver: See `CubinLauncher`.
        stream: See `CubinLauncher`.
        mend: What makes the bundle anew, for errors.

    Raises:
        UnsupportedError: a kernel is missing, or another than this version launches.
        CorruptInputError: a file is not what the bundle says.
        Step35Error: the driver does not take a kernel.
    """
    have = {(file.plugin, file.name): file for file in files}
    loaded: dict[Specialisation, Cubin] = {}
    for variant in variants:
        file = have.get((variant.plugin, variant.name))
        named = f"kernel {variant.plugin}/{variant.name}"
        if file is None:
            raise UnsupportedError(f"{directory} has no {named}, which this version launches", mend)
        facts = _facts(directory / file.launch, mend)
        code = (directory / file.code).read_bytes()
        if digest(code) not in facts.digests.values():
            raise CorruptInputError(f"{file.code} is not the code that {file.launch} describes", mend)
        _check(named, file, facts, variant, target, mend)
        launch = facts.launch
        function = driver.load(code, launch.entry, launch.shared_bytes)
        loaded[Specialisation.of(variant)] = Cubin.of(variant, launch, function)
    return CubinLauncher(driver, stream, loaded)


def _facts(path: Path, mend: str) -> Facts:
    try:
        return Facts.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise CorruptInputError(f"{path} is damaged: {error.errors()[0]['msg']}", mend) from None


def _check(
    named: str, file: KernelFile, facts: Facts, variant: KernelVariant, target: GpuTarget, mend: str
) -> None:
    """See that a file was compiled as its kernel is launched by this version."""
    taken = tuple((a.name, a.type) for a in facts.launch.arguments)
    passed = (*variant.signature.items(), *((a.name, a.type) for a in SCRATCH))
    what = (
        (file.constants, dict(variant.constants), "constants"),
        (taken, passed, "arguments"),
        (facts.target, target.name, "GPU"),
        (facts.launch.scratch_bytes, 0, "scratch memory"),
    )
    for found, wanted, kind in what:
        if found != wanted:
            raise UnsupportedError(
                f"{named} was compiled for other {kind} than this version launches it with: {found}", mend
            )
