"""A segment as a network, and a network as an engine."""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from step35_trt.dialects.tensorrt import InputWeights, NoPlugins, TensorRtOps, Weights
from step35_trt.dialects.tensorrt_functional import Functional
from step35_trt.dialects.tensorrt_progress import monitor
from step35_trt.dialects.tensorrt_timing import TimingCache
from step35_trt.errors import UnsupportedError
from step35_trt.interrupts import noticed
from step35_trt.progress import silent

if TYPE_CHECKING:
    from types import ModuleType

    from step35_trt.progress import Progress
    from step35_trt.segments import Segment
    from step35_trt.signatures import Site
    from step35_trt.weight_forms import Forms


OLDEST = 11  # the first TensorRT whose networks are written here


@dataclass(frozen=True)
class Profile:
    """A range of packed tokens that an engine is tuned for: at least, mostly, at most."""

    least: int
    mostly: int
    most: int


def profiles(sequences: int, draft_tokens: int, prefill_chunk: int) -> tuple[Profile, ...]:
    """One for decoding and verification (1 to 1 + `draft_tokens` tokens a sequence), one for prefill."""
    verified = sequences * (1 + draft_tokens)
    return Profile(1, min(verified, 1 + draft_tokens), verified), Profile(1, prefill_chunk, prefill_chunk)


@dataclass(frozen=True)
class Engine:
    """A serialised engine and how long it took to build, in seconds."""

    data: bytes
    seconds: float


@dataclass
class Builder:
    """Writes and builds networks with one of TensorRT's modules.

    Attributes:
        trt: `tensorrt_rtx` or `tensorrt`.
        timing: Kept between builds, for a TensorRT that times kernels when it builds.
    """

    trt: ModuleType
    timing: TimingCache | None = None

    def __post_init__(self) -> None:
        self.log = error_log(self.trt)
        self.builder = self.trt.Builder(self.log)

    @classmethod
    def rtx(cls) -> Builder:
        """TensorRT-RTX, which needs no GPU to build.

        Raises:
            UnsupportedError: it is not installed.
        """
        try:
            return cls(importlib.import_module("tensorrt_rtx"))
        except ImportError:
            raise UnsupportedError(
                "TensorRT-RTX is not installed", "Install it with: pip install 'step35-trt[rtx]'"
            ) from None

    @classmethod
    def tensorrt(cls, capability: str) -> Builder:
        """Full TensorRT, which builds for the GPU that it runs on.

        Args:
            capability: Of that GPU, as `9.0`.

        Raises:
            UnsupportedError: it is not installed, too old, or does not start.
        """
        hint = "On the machine with the GPU: pip install tensorrt"
        try:
            trt = importlib.import_module("tensorrt")
        except (ImportError, OSError):
            raise UnsupportedError("TensorRT is not installed", hint) from None
        version = str(trt.__version__)
        if int(version.split(".", maxsplit=1)[0]) < OLDEST:
            raise UnsupportedError(f"TensorRT {version} is too old: {OLDEST} or newer is needed", hint)
        try:
            return cls(trt, TimingCache.of(version, capability))
        except (TypeError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UnsupportedError(f"TensorRT {version} does not start here: {reason}") from None

    @property
    def version(self) -> str:
        """Of the module."""
        return str(self.trt.__version__)

    def network(self) -> Any:
        """An empty, strongly typed network."""
        return self.builder.create_network(1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))

    def write(self, segment: Segment, forms: Forms, weights: Weights | None = None) -> Functional:
        """A segment as a network.

        Inputs are `x0 ..` as in `segment.inputs`, outputs `y0 ..`; weights, unless others are given, are the
        inputs that `segment.alias` names.

        Raises:
            UnsupportedError: types do not fit; the module and the line of the model are named.
        """
        site = segment.calls[0].site

        def enter(entered: Site) -> None:
            nonlocal site
            site = entered

        functional = Functional(self.trt, self.network(), lambda: str(site))
        given = weights or InputWeights(segment.alias().__getitem__)
        ops = TensorRtOps(functional, forms, given, NoPlugins(), lambda: site)
        inputs = [ops.input(f"x{i}", value.type) for i, value in enumerate(segment.inputs)]
        for i, tensor in enumerate(segment.replay(ops, inputs, enter)):
            functional.output(f"y{i}", tensor.handle)
        return functional

    def build(
        self,
        written: Functional,
        ranges: tuple[Profile, ...],
        capability: str,
        progress: Progress = silent,
    ) -> Engine:
        """Compile a network for GPUs of one compute capability, such as `12.1`.

        Ctrl-C ends it at TensorRT's next step.

        Raises:
            UnsupportedError: the capability is unknown to this TensorRT, or it cannot build the network.
            KeyboardInterrupt: the user ended it.
        """
        self.log.clear()
        config = self.builder.create_builder_config()
        self._aim(config, capability)
        # Without it an engine may take memory while it runs, which no CUDA graph can record. Full TensorRT,
        # which knows no such flag, takes what it needs with the context.
        if recordable := getattr(self.trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None):
            config.set_flag(recordable)
        for profile in ranges:
            self._add(config, written.network, profile)
        if self.timing:
            self.timing.attach(config)
        started = time.perf_counter()
        with noticed() as stopped:
            # TensorRT does not keep it alive.
            watching = monitor(self.trt, progress, stopped)
            config.progress_monitor = watching
            data = self.builder.build_serialized_network(written.network, config)
        if watching.failure:
            raise watching.failure
        if data is None:
            raise UnsupportedError(f"{self.trt.__name__} cannot build the segment: {self.log.first}")
        seconds = time.perf_counter() - started
        if self.timing:
            self.timing.keep(config)
        return Engine(bytes(data), seconds)

    def _aim(self, config: Any, capability: str) -> None:
        known = getattr(self.trt, "ComputeCapability", None)
        if known is None:
            return  # full TensorRT builds for the GPU that it finds; whoever made this has looked at that
        wanted = getattr(known, f"SM{capability.replace('.', '')}", None)
        if wanted is None:
            raise UnsupportedError(
                f"{self.trt.__name__} {self.version} builds no engine here for compute capability "
                f"{capability}",
                "Full TensorRT builds only on the GPU itself.",
            )
        config.num_compute_capabilities = 1
        config.set_compute_capability(wanted, 0)

    def _add(self, config: Any, network: Any, profile: Profile) -> None:
        shapes = self.builder.create_optimization_profile()
        for i in range(network.num_inputs):
            tensor = network.get_input(i)
            if -1 in tuple(tensor.shape):
                rest = tuple(tensor.shape)[1:]
                sizes = (profile.least, profile.mostly, profile.most)
                shapes.set_shape(tensor.name, *((size, *rest) for size in sizes))
        config.add_optimization_profile(shapes)


def error_log(trt: ModuleType) -> Any:
    """A logger that keeps errors instead of printing them."""

    class Log(trt.ILogger):  # type: ignore[name-defined,misc] # TensorRT calls back a class of its own
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        @property
        def first(self) -> str:
            return self.errors[0] if self.errors else "no reason given"

        def clear(self) -> None:
            self.errors.clear()

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Log()
