"""`EngineRuntime` by TensorRT-RTX, which compiles kernels when an engine first runs, and by TensorRT.

Of both the same few calls are used; what TensorRT-RTX alone has is `Compiled`. Never run yet on a GPU: names
and order of the calls are those of TensorRT-RTX 1.7 and of the bindings of TensorRT 11.4.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from step35_trt.dialects.tensorrt_functional import DATA_TYPES
from step35_trt.dialects.tensorrt_segment import Profile, error_log
from step35_trt.errors import CorruptInputError, UnsupportedError
from step35_trt.journal import plain_os_errors, replacing
from step35_trt.resources import cache_folder
from step35_trt.runtime.device.engine_runtime import EngineTensor

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from step35_trt.runtime.device.engine_runtime import Scratch
    from step35_trt.weight_forms import Dtype

DTYPES = {name: dtype for dtype, name in DATA_TYPES.items()}


@dataclass
class Compiled:
    """Machine code that TensorRT-RTX compiled here, in a file of its own form, which all engines share.

    TensorRT-RTX compares the file with version, GPU and driver, and leaves alone what does not fit.
    """

    path: Path
    _cache: Any = None
    _stored: bytes = b""

    @classmethod
    def of(cls, version: str, capability: str) -> Compiled:
        """The user's, for one version of TensorRT-RTX and one kind of GPU."""
        name = f"{version}-sm{capability.replace('.', '')}.kernels"
        return cls(cache_folder() / "tensorrt-rtx" / name)

    def attach(self, config: Any) -> None:
        """Let executions of a runtime configuration take what is known, and add to it."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            if self.path.is_file():
                self._stored = self.path.read_bytes()
                self._cache.deserialize(self._stored)
        config.set_runtime_cache(self._cache)

    def keep(self) -> None:
        """Write what is known, where something was added.

        Raises:
            UsageError: the cache folder cannot be written.
        """
        if self._cache is None:
            return
        content = bytes(self._cache.serialize())
        if content == self._stored:
            return
        with plain_os_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as stream:
            stream.write(content)
        self._stored = content


@dataclass
class TensorRtRuntime:
    """`EngineRuntime`.

    Attributes:
        trt: `tensorrt_rtx` or `tensorrt`.
        compiled: For TensorRT-RTX; None for TensorRT, whose engines hold their machine code.

    Raises:
        UnsupportedError: it does not start, for want of a driver say.
    """

    trt: ModuleType
    compiled: Compiled | None
    log: Any = field(init=False)
    _runtime: Any = field(init=False)

    def __post_init__(self) -> None:
        self.log = error_log(self.trt)
        try:
            self._runtime = self.trt.Runtime(self.log)
        except (TypeError, RuntimeError):  # what its bindings make of no object
            raise UnsupportedError(f"{self.trt.__name__} does not start here: {self.log.first}") from None

    def load(self, file: Path) -> TensorRtEngine:
        """See `EngineRuntime`."""
        self.log.clear()
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            self._check(file, content)
            engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise UnsupportedError(f"{self.trt.__name__} cannot load {file.name}: {self.log.first}")
        return TensorRtEngine(self, engine, file.name)

    def keep(self) -> None:
        """See `EngineRuntime`."""
        if self.compiled:
            self.compiled.keep()

    def _check(self, file: Path, content: mmap.mmap) -> None:
        """What TensorRT-RTX says of an engine before it loads it; TensorRT says it when it does."""
        if not hasattr(self.trt, "EngineValidity"):
            return
        validity, diagnostics = self._runtime.get_engine_validity(content)
        if validity == self.trt.EngineValidity.INVALID:
            reasons = self.trt.EngineInvalidityDiagnostics.__members__
            said = [name for name, bit in reasons.items() if diagnostics & int(bit)] or [self.log.first]
            raise UnsupportedError(f"{self.trt.__name__} cannot run {file.name} here: {', '.join(said)}")


@dataclass(frozen=True)
class TensorRtEngine:
    """`LoadedEngine`.

    Attributes:
        runtime: Which loaded it; outlives it.
        engine: An `ICudaEngine`.
        name: For people.
    """

    runtime: TensorRtRuntime
    engine: Any
    name: str

    @cached_property
    def tensors(self) -> dict[str, EngineTensor]:
        """See `LoadedEngine`.

        Raises:
            CorruptInputError: it wants a tensor on the host, or not in rows.
        """
        trt, engine, found = self.runtime.trt, self.engine, {}
        for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
            if (
                engine.get_tensor_location(name) != trt.TensorLocation.DEVICE
                or engine.get_tensor_format(name) != trt.TensorFormat.LINEAR
            ):
                raise CorruptInputError(f"{self.name} takes {name} not as it lies on the device")
            found[name] = EngineTensor(
                cast("Dtype", DTYPES[engine.get_tensor_dtype(name).name]),
                tuple(engine.get_tensor_shape(name)),
                engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT,
            )
        return found

    @cached_property
    def ranges(self) -> tuple[Profile, ...]:
        """See `LoadedEngine`: those of the first input whose size is not fixed; the others' are equal."""
        name = next(name for name, tensor in self.tensors.items() if tensor.sized)
        profiles = range(self.engine.num_optimization_profiles)
        shapes = (self.engine.get_tensor_profile_shape(name, profile) for profile in profiles)
        return tuple(Profile(*(size[0] for size in sizes)) for sizes in shapes)

    @property
    def scratch_bytes(self) -> int:
        """See `LoadedEngine`."""
        return int(self.engine.device_memory_size_v2)

    def context(self, profile: int, scratch: Scratch, stream: int, *, returning: bool) -> TensorRtContext:
        """See `LoadedEngine`."""
        trt, compiled = self.runtime.trt, self.runtime.compiled
        self.runtime.log.clear()
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if compiled:
            # Kernels compiled in the background would end a recording that another thread is at.
            kinds = trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER if returning else kinds.NONE
            config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # the whole step is recorded here
            compiled.attach(config)
        context = self.engine.create_execution_context(config)
        if context is None:
            raise UnsupportedError(f"{self.name} cannot be executed: {self.runtime.log.first}")
        made = TensorRtContext(self, context)
        made.demand(context.set_optimization_profile_async(profile, stream), f"profile {profile}")
        context.set_device_memory(scratch.address, scratch.nbytes)
        return made


@dataclass(frozen=True)
class TensorRtContext:
    """`EngineContext`.

    Attributes:
        engine: Whose; outlives it.
        context: An `IExecutionContext`.
    """

    engine: TensorRtEngine
    context: Any

    def resize(self, name: str, shape: tuple[int, ...]) -> None:
        """See `EngineContext`."""
        self.demand(self.context.set_input_shape(name, shape), f"{name} of shape {list(shape)}")

    def place(self, name: str, address: int) -> None:
        """See `EngineContext`."""
        self.demand(self.context.set_tensor_address(name, address), f"the place of {name}")

    def enqueue(self, stream: int) -> None:
        """See `EngineContext`."""
        self.demand(self.context.execute_async_v3(stream), "to be executed")

    def recordable(self, stream: int) -> bool:
        """See `EngineContext`; TensorRT does not say, and its segments have nothing that prevents it."""
        asked = getattr(self.context, "is_stream_capturable", None)
        return asked is None or bool(asked(stream))

    def demand(self, taken: bool, what: str) -> None:
        """See that the library took what it was told.

        Raises:
            UnsupportedError: it did not.
        """
        if not taken:
            raise UnsupportedError(f"{self.engine.name} refuses {what}: {self.engine.runtime.log.first}")
