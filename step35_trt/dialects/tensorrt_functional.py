"""A functional layer over `INetworkDefinition`, strongly typed, with TensorRT-LLM's names where they fit.

It writes into any network it is handed, through the module that the network came from: `tensorrt_rtx`,
`tensorrt`, or the `trt_network` of a TensorRT-LLM Network, a class which exists up to 1.2 and goes with
TensorRT 10. The network has to be created strongly typed. Run so far with TensorRT-RTX 1.7 alone; scales in
blocks of two dimensions need a TensorRT whose dequantise layer has a `block_shape`.

TensorRT takes operands of different types without a word and refuses the whole network much later; here each
operation checks what it is given.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from step35_trt.errors import UnsupportedError
from step35_trt.weight_forms import NUMPY

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from numpy.typing import NDArray

    from step35_trt.weight_forms import Activation, Dtype, WeightForm

DATA_TYPES = {
    "bfloat16": "BF16",
    "float32": "FLOAT",
    "float8_e4m3fn": "FP8",
    "int8": "INT8",
    "int4": "INT4",
    "int64": "INT64",
}

# TensorRT's objects come from whichever module is in use: none of them can be named here.
ITensor = Any
INetworkDefinition = Any


@dataclass
class Functional:
    """Operations on the tensors of one network.

    Attributes:
        trt: The module of the network.
        network: What is written into.
        where: Says which part of the model is being written, for errors.
        constants: Values of the constant layers by the layers' names. TensorRT does not copy them, so they
            live as long as this; nor does it hand back those of its own types.
    """

    trt: ModuleType
    network: INetworkDefinition
    where: Callable[[], str]
    constants: dict[str, NDArray[np.generic]] = field(default_factory=dict)

    def dtype(self, name: Dtype) -> Any:
        """TensorRT's type of a name."""
        return getattr(self.trt.DataType, DATA_TYPES[name])

    def input(self, name: str, dtype: Dtype, shape: tuple[int, ...]) -> ITensor:
        """A network input; -1 is dynamic."""
        return self.network.add_input(name, self.dtype(dtype), shape)

    def output(self, name: str, x: ITensor) -> None:
        """Mark a network output."""
        x.name = name
        self.network.mark_output(x)

    def constant(
        self, values: NDArray[np.generic], dtype: Dtype, shape: tuple[int, ...] | None = None
    ) -> ITensor:
        """Values inside the network; `shape` as decoded, where int4 values are packed."""
        shape = values.shape if shape is None else shape
        values = np.ascontiguousarray(values)
        size = int(np.prod(shape))
        layer = self.network.add_constant(
            shape, self.trt.Weights(self.dtype(dtype), values.ctypes.data, size)
        )
        layer.name = f"constant.{self.network.num_layers}"
        self.constants[layer.name] = values
        return self._made(layer)

    def scalar(self, value: float, dtype: Activation) -> ITensor:
        """A number that broadcasts over `[t, n]`."""
        return self.constant(np.full((1, 1), value, NUMPY[dtype]), dtype)

    def cast(self, x: ITensor, dtype: Dtype) -> ITensor:
        """`x` in another type; itself where it has that type."""
        wanted = self.dtype(dtype)
        return x if x.dtype == wanted else self._made(self.network.add_cast(x, wanted))

    def matmul(self, a: ITensor, b: ITensor, *, transb: bool = False) -> ITensor:
        """`a b`, or `a bᵀ`, in the operands' common type."""
        self._same("matmul", a, b)
        none, transpose = self.trt.MatrixOperation.NONE, self.trt.MatrixOperation.TRANSPOSE
        return self._made(self.network.add_matrix_multiply(a, none, b, transpose if transb else none))

    def add(self, a: ITensor, b: ITensor) -> ITensor:
        """Elementwise sum of one type; sizes of 1 broadcast."""
        return self._elementwise("SUM", a, b)

    def mul(self, a: ITensor, b: ITensor) -> ITensor:
        """Elementwise product."""
        return self._elementwise("PROD", a, b)

    def minimum(self, a: ITensor, b: ITensor) -> ITensor:
        """Elementwise minimum."""
        return self._elementwise("MIN", a, b)

    def maximum(self, a: ITensor, b: ITensor) -> ITensor:
        """Elementwise maximum."""
        return self._elementwise("MAX", a, b)

    def sigmoid(self, x: ITensor) -> ITensor:
        """Elementwise."""
        return self._made(self.network.add_activation(x, self.trt.ActivationType.SIGMOID))

    def silu(self, x: ITensor, dtype: Dtype) -> ITensor:
        """`x sigmoid(x)` in fp32, rounded once to `dtype` (specification 2.7)."""
        wide = self.cast(x, "float32")
        return self.cast(self.mul(wide, self.sigmoid(wide)), dtype)

    def rms_norm(self, x: ITensor, gamma: ITensor, eps: float, dtype: Dtype) -> ITensor:
        """`x / rms(x) * gamma` over the last axis of `[t, n]`, in fp32; gamma is fp32 `[1, n]`."""
        wide, unary = self.cast(x, "float32"), self.trt.UnaryOperation
        average = self.trt.ReduceOperation.AVG
        mean = self._made(self.network.add_reduce(self.mul(wide, wide), average, 1 << 1, True))
        root = self._made(self.network.add_unary(self.add(mean, self.scalar(eps, "float32")), unary.SQRT))
        inverse = self._made(self.network.add_unary(root, unary.RECIP))
        return self.cast(self.mul(self.mul(wide, inverse), gamma), dtype)

    def embedding(self, token_ids: ITensor, weight: ITensor) -> ITensor:
        """Rows of `[V, D]` by id."""
        return self._made(self.network.add_gather(weight, token_ids, 0))

    def embedding_int8(
        self, token_ids: ITensor, values: ITensor, scales: ITensor, form: WeightForm, dtype: Dtype
    ) -> ITensor:
        """Rows of int8 `[V, D]` by id, decoded: only the rows that are asked for."""
        blocks, size = form.scale_shape[1], form.block[1]
        codes = self.cast(self.embedding(token_ids, values), "float32")
        factors = self.embedding(token_ids, scales)
        wide = self.mul(self.view(codes, (-1, blocks, size)), self.view(factors, (-1, blocks, 1)))
        return self.cast(self.view(wide, (-1, blocks * size)), dtype)

    def view(self, x: ITensor, shape: tuple[int, ...]) -> ITensor:
        """The same elements in another shape; -1 is what is left."""
        layer = self.network.add_shuffle(x)
        layer.reshape_dims = shape
        return self._made(layer)

    def concat(self, inputs: list[ITensor], dim: int) -> ITensor:
        """Tensors of one type, one after the other along `dim`."""
        self._same("concat", *inputs)
        layer = self.network.add_concatenation(inputs)
        layer.axis = dim
        return self._made(layer)

    def dequantize(self, values: ITensor, scales: ITensor, form: WeightForm, dtype: Activation) -> ITensor:
        """Codes times their scales, in `dtype`: the weight half of what compilers fuse into a product."""
        if len(form.scale_shape) > 1 and any(
            n % edge for n, edge in zip(form.shape, form.block, strict=True)
        ):
            raise UnsupportedError(
                f"{self.where()}: {list(form.shape)} is not made of whole blocks of {list(form.block)}"
            )
        layer = self.network.add_dequantize(values, scales, self.dtype(dtype))
        if len(form.scale_shape) == 1:
            layer.axis = 0
        elif form.block[0] > 1:
            layer.block_shape = form.block  # blocks along one axis are known by the scales' shape
        return self._made(layer)

    def _elementwise(self, operation: str, a: ITensor, b: ITensor) -> ITensor:
        self._same(operation, a, b)
        kind = getattr(self.trt.ElementWiseOperation, operation)
        return self._made(self.network.add_elementwise(a, b, kind))

    def _same(self, word: str, *inputs: ITensor) -> None:
        types = [x.dtype.name for x in inputs]
        if len(set(types)) > 1:
            raise UnsupportedError(
                f"{self.where()}: {word} takes operands of one type, not {' and '.join(types)}"
            )

    def _made(self, layer: Any) -> ITensor:
        """The result of a layer, which remembers which module of the model it belongs to."""
        if layer is None:
            raise UnsupportedError(f"{self.where()}: TensorRT refuses the operation")
        layer.metadata = self.where()
        result = layer.get_output(0)
        try:
            _ = result.shape
        except RuntimeError:
            raise UnsupportedError(
                f"{self.where()}: TensorRT finds that the operands' shapes do not fit"
            ) from None
        return result
