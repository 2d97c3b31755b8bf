"""The calls to TensorRT's runtime, on objects that have just the names of TensorRT-RTX's own.

No engine can be loaded without a driver. What is proven here: every name exists in the library that is
installed, calls come in the order that they have to, and what it refuses becomes a sentence.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock, create_autospec

import pytest

trt = pytest.importorskip("tensorrt_rtx")

from step35_trt.dialects.tensorrt_segment import Profile  # noqa: E402 - after the skip
from step35_trt.errors import CorruptInputError, UnsupportedError, UsageError  # noqa: E402
from step35_trt.runtime.device.engine_runtime import EngineTensor, Scratch  # noqa: E402
from step35_trt.runtime.device.tensorrt_runtime import (  # noqa: E402
    Compiled,
    TensorRtContext,
    TensorRtEngine,
    TensorRtRuntime,
)

if TYPE_CHECKING:
    from pathlib import Path

SCRATCH = Scratch(512, 4096)
INPUTS = {
    "x0": ("BF16", (-1, 64), "INPUT"),
    "w0": ("INT4", (128, 64), "INPUT"),
    "w0.scales": ("BF16", (128, 1), "INPUT"),
    "y0": ("FLOAT", (-1, 128), "OUTPUT"),
}


def engine_mock() -> Mock:
    engine = Mock(spec=trt.ICudaEngine)
    engine.num_io_tensors, engine.num_optimization_profiles = len(INPUTS), 2
    engine.device_memory_size_v2 = 4000
    engine.get_tensor_name.side_effect = list(INPUTS).__getitem__
    engine.get_tensor_dtype.side_effect = lambda name: getattr(trt.DataType, INPUTS[name][0])
    engine.get_tensor_shape.side_effect = lambda name: trt.Dims(INPUTS[name][1])
    engine.get_tensor_mode.side_effect = lambda name: getattr(trt.TensorIOMode, INPUTS[name][2])
    engine.get_tensor_location.return_value = trt.TensorLocation.DEVICE
    engine.get_tensor_format.return_value = trt.TensorFormat.LINEAR
    engine.get_tensor_profile_shape.side_effect = lambda _, profile: [
        trt.Dims((size, 64)) for size in ((1, 3, 4), (1, 32, 32))[profile]
    ]
    engine.create_runtime_config.side_effect = lambda: Mock(spec=trt.IRuntimeConfig)
    engine.create_execution_context.return_value = Mock(spec=trt.IExecutionContext)
    return engine


def runtime_of(engine: object, compiled: Compiled | None = None) -> TensorRtRuntime:
    runtime = TensorRtRuntime(trt, compiled)
    runtime._runtime = Mock(spec=trt.Runtime)
    runtime._runtime.get_engine_validity.return_value = trt.EngineValidity.VALID, 0
    runtime._runtime.deserialize_cuda_engine.side_effect = lambda content: engine if bytes(content) else None
    return runtime


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.engine"
    path.write_bytes(b"engine")
    return path


@pytest.fixture
def loaded(file: Path, tmp_path: Path) -> TensorRtEngine:
    return runtime_of(engine_mock(), Compiled(tmp_path / "cache" / "kernels")).load(file)


def test_what_an_engine_says_of_itself(loaded: TensorRtEngine) -> None:
    assert loaded.tensors == {
        "x0": EngineTensor("bfloat16", (-1, 64)),
        "w0": EngineTensor("int4", (128, 64)),
        "w0.scales": EngineTensor("bfloat16", (128, 1)),
        "y0": EngineTensor("float32", (-1, 128), output=True),
    }
    assert loaded.ranges == (Profile(1, 3, 4), Profile(1, 32, 32))
    assert loaded.scratch_bytes == 4000


@pytest.mark.parametrize(
    ("method", "value"),
    [("get_tensor_location", trt.TensorLocation.HOST), ("get_tensor_format", trt.TensorFormat.CHW2)],
)
def test_tensors_that_no_buffer_is_like(file: Path, method: str, value: object) -> None:
    engine = engine_mock()
    getattr(engine, method).return_value = value
    with pytest.raises(CorruptInputError, match=r"a\.engine takes x0 not as it lies"):
        _ = runtime_of(engine).load(file).tensors


@pytest.mark.parametrize("returning", [True, False])
def test_a_context(loaded: TensorRtEngine, returning: bool) -> None:
    engine: Any = loaded.engine
    made = loaded.context(1, SCRATCH, 7, returning=returning)
    [config] = (call.args[0] for call in engine.create_execution_context.call_args_list)
    config.set_execution_context_allocation_strategy.assert_called_once_with(
        trt.ExecutionContextAllocationStrategy.USER_MANAGED
    )
    kinds = trt.DynamicShapesKernelSpecializationStrategy
    wanted = kinds.EAGER if returning else kinds.NONE
    assert config.dynamic_shapes_kernel_specialization_strategy == wanted
    assert config.cuda_graph_strategy == trt.CudaGraphStrategy.DISABLED
    config.set_runtime_cache.assert_called_once()
    context: Any = made.context
    assert [call[0] for call in context.method_calls] == [
        "set_optimization_profile_async",
        "set_device_memory",
    ]
    context.set_optimization_profile_async.assert_called_once_with(1, 7)
    context.set_device_memory.assert_called_once_with(SCRATCH.address, SCRATCH.nbytes)


def test_all_contexts_share_what_was_compiled(loaded: TensorRtEngine) -> None:
    engine: Any = loaded.engine
    for _ in range(2):
        loaded.context(0, SCRATCH, 0, returning=True)
    first, second = (call.args[0] for call in engine.create_execution_context.call_args_list)
    assert first.set_runtime_cache.call_args == second.set_runtime_cache.call_args
    assert not second.create_runtime_cache.called


def test_tensorrt_itself_compiles_nothing_here(file: Path) -> None:
    """Its bindings have no such settings: a name that is set all the same would be an error there."""
    names = "create_execution_context create_runtime_config".split()
    config = create_autospec(
        SimpleNamespace(set_execution_context_allocation_strategy=lambda strategy: None), spec_set=True
    )
    engine = engine_mock()
    engine.create_runtime_config.side_effect = lambda: config
    runtime_of(engine).load(file).context(0, SCRATCH, 0, returning=True)
    assert [call[0] for call in engine.method_calls] == names[::-1]


def test_a_step(loaded: TensorRtEngine) -> None:
    made = loaded.context(0, SCRATCH, 0, returning=True)
    made.resize("x0", (3, 64))
    made.place("x0", 1024)
    made.enqueue(9)
    context: Any = made.context
    context.set_input_shape.assert_called_once_with("x0", (3, 64))
    context.set_tensor_address.assert_called_once_with("x0", 1024)
    context.execute_async_v3.assert_called_once_with(9)
    for answer in (True, False):
        context.is_stream_capturable.return_value = answer
        assert made.recordable(9) is answer
    assert TensorRtContext(loaded, SimpleNamespace()).recordable(9)


@pytest.mark.parametrize(
    ("method", "call"),
    [
        ("set_input_shape", lambda made: made.resize("x0", (3, 64))),
        ("set_tensor_address", lambda made: made.place("x0", 1)),
        ("execute_async_v3", lambda made: made.enqueue(0)),
    ],
)
def test_what_the_library_refuses(loaded: TensorRtEngine, method: str, call: Any) -> None:
    made = loaded.context(0, SCRATCH, 0, returning=True)
    getattr(made.context, method).return_value = False
    loaded.runtime.log.log(trt.ILogger.Severity.ERROR, "because")
    with pytest.raises(UnsupportedError, match=r"a\.engine refuses .*: because"):
        call(made)


def test_no_context(loaded: TensorRtEngine) -> None:
    engine: Any = loaded.engine
    engine.create_execution_context.return_value = None
    with pytest.raises(UnsupportedError, match=r"a\.engine cannot be executed: no reason given"):
        loaded.context(0, SCRATCH, 0, returning=True)


def test_an_engine_of_another_version(file: Path) -> None:
    runtime = runtime_of(engine_mock())
    bits = trt.EngineInvalidityDiagnostics
    found = int(bits.VERSION_MISMATCH) | int(bits.OLD_CUDA_DRIVER)
    runtime._runtime.get_engine_validity.return_value = trt.EngineValidity.INVALID, found
    with pytest.raises(UnsupportedError, match="here: VERSION_MISMATCH, OLD_CUDA_DRIVER"):
        runtime.load(file)
    runtime._runtime.get_engine_validity.return_value = trt.EngineValidity.SUBOPTIMAL, 0
    assert runtime.load(file).name == "a.engine"


def test_the_library_itself_on_this_machine(file: Path) -> None:
    """Without a driver it says so, or that this is no engine."""
    with pytest.raises(UnsupportedError, match=r"tensorrt_rtx cannot (run|load) a\.engine"):
        TensorRtRuntime(trt, None).load(file)


def test_a_library_that_does_not_start() -> None:
    def nothing(_: object) -> None:
        raise TypeError("factory function returned nullptr")

    broken = SimpleNamespace(__name__="tensorrt", ILogger=trt.ILogger, Runtime=nothing)
    with pytest.raises(UnsupportedError, match="tensorrt does not start here"):
        TensorRtRuntime(broken, None)


# What was compiled.


def config_of(cache: Mock) -> Mock:
    config = Mock(spec=trt.IRuntimeConfig)
    config.create_runtime_cache.return_value = cache
    return config


def cache_of(content: bytes) -> Mock:
    cache = Mock(spec=trt.IRuntimeCache)
    cache.serialize.return_value = content
    return cache


def test_the_next_start_finds_it(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "kernels"
    Compiled(path).keep()
    assert not path.exists()  # nothing ran
    first = Compiled(path)
    cache = cache_of(b"compiled")
    first.attach(config_of(cache))
    assert not cache.deserialize.called
    first.keep()
    assert path.read_bytes() == b"compiled"
    written = path.stat().st_mtime_ns
    first.keep()
    second, again = Compiled(path), cache_of(b"compiled")
    second.attach(config_of(again))
    again.deserialize.assert_called_once_with(b"compiled")
    second.keep()
    assert path.stat().st_mtime_ns == written  # nothing came
    again.serialize.return_value = b"compiled and more"
    second.keep()
    assert path.read_bytes() == b"compiled and more"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    compiled = Compiled(tmp_path / "cache" / "kernels")
    compiled.attach(config_of(cache_of(b"compiled")))
    with pytest.raises(UsageError, match="cannot write"):
        compiled.keep()


def test_one_file_for_each_version_and_kind_of_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = Compiled.of("1.7.1", "12.1").path
    assert found == tmp_path / "step35-trt" / "tensorrt-rtx" / "1.7.1-sm121.kernels"
