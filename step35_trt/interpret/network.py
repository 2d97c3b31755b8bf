"""An interpreter of `INetworkDefinition` in numpy: the kinds of layers that the tensorrt dialect emits.

A layer's result is rounded to the type that the network declares for it, and a product accumulates in fp32:
what a strongly typed network promises at least. An engine may keep more between layers that it fuses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from step35_trt.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType

Array = NDArray[np.generic]

TYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "FLOAT": np.dtype(np.float32),
    "FP8": np.dtype(ml_dtypes.float8_e4m3fn),
    "INT8": np.dtype(np.int8),
    "INT64": np.dtype(np.int64),
}
ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "SUM": np.add,
    "PROD": np.multiply,
    "MIN": np.minimum,
    "MAX": np.maximum,
}
UNARY: dict[str, Callable[..., Any]] = {"SQRT": np.sqrt, "RECIP": np.reciprocal}


def evaluate(
    trt: ModuleType, network: Any, inputs: Mapping[str, Array], constants: Mapping[str, Array]
) -> dict[str, Array]:
    """Outputs by name.

    Args:
        trt: The module of the network.
        network: An `INetworkDefinition`.
        inputs: By name; int4 as uint8, two values of a row in a byte.
        constants: Values of the constant layers by layer name, int4 packed likewise.

    Raises:
        UnsupportedError: an input is missing or of another type or shape, or a kind of layer is not known.
    """
    values: dict[str, Array] = {}
    last = _last_uses(network)
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        if tensor.name not in inputs:
            raise UnsupportedError(f"the network's input {tensor.name} is not given")
        values[tensor.name] = _given(tensor, inputs[tensor.name])
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        operands = [values[layer.get_input(j).name] for j in range(layer.num_inputs)]
        # The base class hides a layer's own attributes until it is told what it is.
        kind = layer.type.name
        if kind not in KINDS:
            raise UnsupportedError(f"{layer.metadata}: the interpreter knows no layer {kind}")
        class_name, run = KINDS[kind]
        layer.__class__ = getattr(trt, class_name)
        result = layer.get_output(0)
        if kind == "CONSTANT":
            values[result.name] = _unpacked(result, constants[layer.name]).reshape(tuple(layer.shape))
        else:
            values[result.name] = np.asarray(run(layer, *operands)).astype(
                TYPES[result.dtype.name], copy=False
            )
        del operands
        for name in last.get(i, ()):
            del values[name]
    return {(name := network.get_output(i).name): values[name] for i in range(network.num_outputs)}


def _last_uses(network: Any) -> dict[int, set[str]]:
    """What each layer is the last to take, outputs apart: weights are large once they are widened."""
    users: dict[str, int] = {}
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        users |= {layer.get_input(j).name: i for j in range(layer.num_inputs)}
    given = {network.get_output(i).name for i in range(network.num_outputs)}
    found: dict[int, set[str]] = {}
    for name, i in users.items():
        if name not in given:
            found.setdefault(i, set()).add(name)
    return found


def _given(tensor: Any, value: Array) -> Array:
    value = _unpacked(tensor, value)
    declared = tuple(tensor.shape)
    fits = len(declared) == value.ndim and all(
        d in (-1, n) for d, n in zip(declared, value.shape, strict=True)
    )
    if not fits or value.dtype != TYPES.get(tensor.dtype.name, np.int8):
        raise UnsupportedError(
            f"the network's input {tensor.name} is {tensor.dtype.name} {list(declared)}, "
            f"given is {value.dtype} {list(value.shape)}"
        )
    return value


def _unpacked(tensor: Any, value: Array) -> Array:
    """int4 as int8."""
    if tensor.dtype.name != "INT4":
        return value
    low, high = value.view(np.int8) << 4 >> 4, value.view(np.int8) >> 4
    return np.stack([low, high], -1).reshape(*value.shape[:-1], -1)


def _wide(value: Array) -> NDArray[np.float32]:
    return value.astype(np.float32, copy=False)


def _matmul(layer: Any, a: Array, b: Array) -> Array:
    turned = [
        _wide(value).T if op.name == "TRANSPOSE" else _wide(value)
        for value, op in ((a, layer.op0), (b, layer.op1))
    ]
    return np.matmul(*turned)


def _elementwise(layer: Any, a: Array, b: Array) -> Array:
    result: Array = ELEMENTWISE[layer.op.name](_wide(a), _wide(b))
    return result


def _unary(layer: Any, x: Array) -> Array:
    result: Array = UNARY[layer.op.name](_wide(x))
    return result


def _activation(layer: Any, x: Array) -> Array:
    if layer.type.name != "SIGMOID":
        raise UnsupportedError(f"{layer.metadata}: the interpreter knows no activation {layer.type.name}")
    # Written so that no exponential overflows.
    halves: Array = 0.5 * (np.tanh(0.5 * _wide(x)) + 1)
    return halves


def _reduce(layer: Any, x: Array) -> Array:
    if layer.op.name != "AVG":
        raise UnsupportedError(f"{layer.metadata}: the interpreter knows no reduction {layer.op.name}")
    axes = tuple(axis for axis in range(x.ndim) if layer.axes >> axis & 1)
    return np.asarray(_wide(x).mean(axes, keepdims=layer.keep_dims))


def _shuffle(layer: Any, x: Array) -> Array:
    return x.reshape(tuple(layer.reshape_dims))


def _dequantize(layer: Any, values: Array, scales: Array) -> Array:
    wide, factors = _wide(values), _wide(scales)
    if factors.ndim == 1:
        shape = [1] * wide.ndim
        shape[layer.axis] = -1
        return wide * factors.reshape(shape)
    # Blocks get axes of their own, so that the factors are nowhere as large as the values.
    edges = [n // blocks for n, blocks in zip(wide.shape, factors.shape, strict=True)]
    blocked = wide.reshape([size for pair in zip(factors.shape, edges, strict=True) for size in pair])
    spread = factors.reshape([size for blocks in factors.shape for size in (blocks, 1)])
    return (blocked * spread).reshape(wide.shape)


# A kind of layer: its class in TensorRT, and what it computes before the result is rounded.
KINDS: dict[str, tuple[str, Callable[..., Array]]] = {
    "CONSTANT": ("IConstantLayer", lambda _: np.empty(0)),
    "CAST": ("ICastLayer", lambda _, x: x),
    "MATRIX_MULTIPLY": ("IMatrixMultiplyLayer", _matmul),
    "ELEMENTWISE": ("IElementWiseLayer", _elementwise),
    "UNARY": ("IUnaryLayer", _unary),
    "ACTIVATION": ("IActivationLayer", _activation),
    "REDUCE": ("IReduceLayer", _reduce),
    "GATHER": ("IGatherLayer", lambda layer, x, index: np.take(x, index, layer.axis)),
    "CONCATENATION": ("IConcatenationLayer", lambda layer, *parts: np.concatenate(parts, layer.axis)),
    "SHUFFLE": ("IShuffleLayer", _shuffle),
    "DEQUANTIZE": ("IDequantizeLayer", _dequantize),
}
