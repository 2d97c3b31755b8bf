"""The few calls of CUDA's driver that running compiled kernels takes."""

from __future__ import annotations

import ctypes
import importlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from step35_trt.errors import Step35Error, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator

PLAIN_SHARED = 48 * 1024  # bytes of dynamic shared memory that every kernel may have unasked
SLOT = 8  # bytes: the widest parameter of our kernels


class Driver(Protocol):
    """Of one device."""

    def load(self, code: bytes, entry: str, shared_bytes: int) -> int:
        """The function `entry` of a cubin, allowed `shared_bytes` of dynamic shared memory.

        Raises:
            Step35Error: the driver refuses it.
        """
        ...

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        stream: int,
        parameters: bytes,
    ) -> None:
        """Queue blocks of `threads` on a stream.

        `parameters` are the function's in order, each at the start of a slot of eight bytes, little-endian.

        Raises:
            Step35Error: the driver refuses it, or something queued before has failed.
        """
        ...


class CudaDriver:
    """`Driver` through `cuda.bindings`, in the device's primary context, which is torch's."""

    def __init__(self, device: int) -> None:
        """Find the driver.

        Raises:
            UnsupportedError: the package or the driver is missing.
            Step35Error: the driver has no such device.
        """
        try:
            self._cuda: Any = importlib.import_module("cuda.bindings.driver")
        except ImportError:
            raise UnsupportedError(
                "launching compiled kernels needs the package cuda-bindings", "pip install 'step35-trt[cuda]'"
            ) from None
        try:
            self._call("start", self._cuda.cuInit(0))
        except RuntimeError as error:  # the package finds no library to call
            raise UnsupportedError(
                f"CUDA's driver cannot be loaded: {str(error).splitlines()[0]}", "Install NVIDIA's driver."
            ) from None
        [found] = self._call(f"find device {device}", self._cuda.cuDeviceGet(device))
        # Retained until the process ends: torch keeps it as long.
        [self._context] = self._call("open the device", self._cuda.cuDevicePrimaryCtxRetain(found))

    def load(self, code: bytes, entry: str, shared_bytes: int) -> int:
        """See `Driver`; the module stays loaded."""
        cuda = self._cuda
        with self._current():
            [module] = self._call(f"load {entry}", cuda.cuModuleLoadData(code))
            [function] = self._call(f"find {entry}", cuda.cuModuleGetFunction(module, entry.encode()))
            if shared_bytes > PLAIN_SHARED:
                attribute = cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                # The rest of an SM's memory would stay cache, and fewer blocks fit.
                prefer = cuda.CUfunc_cache.CU_FUNC_CACHE_PREFER_SHARED
                self._call(f"arrange memory for {entry}", cuda.cuFuncSetCacheConfig(function, prefer))
                allowed = cuda.cuFuncSetAttribute(function, attribute, shared_bytes)
                self._call(f"give {entry} {shared_bytes} bytes of shared memory", allowed)
        return int(function)

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        stream: int,
        parameters: bytes,
    ) -> None:
        """See `Driver`."""
        count = len(parameters) // SLOT
        values = (ctypes.c_uint64 * count).from_buffer_copy(parameters)
        start = ctypes.addressof(values)
        places = (ctypes.c_void_p * count)(*range(start, start + len(parameters), SLOT))
        with self._current():
            # The driver knows the parameters' sizes from the code, and has copied them when this returns.
            queued = self._cuda.cuLaunchKernel(
                function, *grid, threads, 1, 1, shared_bytes, stream, ctypes.addressof(places), 0
            )
        self._call("launch a kernel", queued)

    @contextmanager
    def _current(self) -> Iterator[None]:
        """The device's context, whichever thread this is and whatever it last worked on."""
        cuda = self._cuda
        [here] = self._call("say its context", cuda.cuCtxGetCurrent())
        if int(here) == int(self._context):
            yield
            return
        self._call("enter a context", cuda.cuCtxPushCurrent(self._context))
        try:
            yield
        finally:
            self._call("leave a context", cuda.cuCtxPopCurrent())

    def _call(self, what: str, answer: tuple[Any, ...]) -> tuple[Any, ...]:
        """What a call gave besides its status."""
        status, *found = answer
        if status != self._cuda.CUresult.CUDA_SUCCESS:
            raise Step35Error(f"CUDA's driver cannot {what}: {status.name}")
        return tuple(found)
