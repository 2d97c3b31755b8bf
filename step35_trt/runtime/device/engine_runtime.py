"""What running a serialised engine asks of the library that it was built with.

`tensorrt_runtime` asks TensorRT-RTX or TensorRT. All that stands before and behind those few calls knows only
what is written here, so that it runs without a GPU too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from step35_trt.dialects.tensorrt_segment import Profile
    from step35_trt.weight_forms import Dtype


@dataclass(frozen=True)
class EngineTensor:
    """An input or output of an engine, in rows one after the other on the device.

    Attributes:
        dtype: Of its values; int4 lies two values of a row in a byte.
        shape: Of the values; -1 where the number of packed tokens decides.
        output: Whether the engine fills it.
    """

    dtype: Dtype
    shape: tuple[int, ...]
    output: bool = False

    @property
    def sized(self) -> bool:
        """Whether it has to be told how many tokens there are."""
        return not self.output and -1 in self.shape

    def of(self, tokens: int) -> tuple[int, ...]:
        """Its shape in a call."""
        return tuple(tokens if size == -1 else size for size in self.shape)


@dataclass(frozen=True)
class Scratch:
    """Memory that executions use while they run; one at a time, so all may share it.

    Attributes:
        address: On the device, a multiple of 256.
        nbytes: How much.
    """

    address: int
    nbytes: int


class EngineContext(Protocol):
    """One way of running an engine: what it is told stays until it is told otherwise.

    Raises:
        UnsupportedError: from every method, where the library refuses.
    """

    def resize(self, name: str, shape: tuple[int, ...]) -> None:
        """The shape of an input."""
        ...

    def place(self, name: str, address: int) -> None:
        """Where an input or output lies on the device."""
        ...

    def enqueue(self, stream: int) -> None:
        """Queue an execution.

        Args:
            stream: Handle of a CUDA stream.
        """
        ...

    def recordable(self, stream: int) -> bool:
        """Whether what is queued with the shapes that were set can become part of a CUDA graph."""
        ...


class LoadedEngine(Protocol):
    """A deserialised engine."""

    @property
    def tensors(self) -> Mapping[str, EngineTensor]:
        """Inputs and outputs by name."""
        ...

    @property
    def ranges(self) -> tuple[Profile, ...]:
        """Packed tokens of a call, one range for each optimisation profile."""
        ...

    @property
    def scratch_bytes(self) -> int:
        """What an execution needs at most, by any profile."""
        ...

    def context(self, profile: int, scratch: Scratch, stream: int, *, returning: bool) -> EngineContext:
        """A new context.

        Args:
            profile: Which of the ranges its calls are in.
            scratch: What its executions use.
            stream: What is queued there from now on finds the profile chosen.
            returning: Its size will come again and again: kernels may be compiled for just that size.

        Raises:
            UnsupportedError: the library refuses.
        """
        ...


class EngineRuntime(Protocol):
    """A library that executes engines."""

    def load(self, file: Path) -> LoadedEngine:
        """Deserialise an engine.

        Raises:
            UnsupportedError: it is for another version, GPU or driver.
        """
        ...

    def keep(self) -> None:
        """Write down what was compiled since the engines were loaded, for the next start."""
        ...
