"""Forms: what is packed decodes to the weight, and codes of a checkpoint are taken as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import ml_dtypes
import numpy as np
import pytest

from step35_trt.errors import UnsupportedError
from step35_trt.quantize.formats import Coding, decode
from step35_trt.weight_forms import Forms, pack, packed_weight, unpack

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from step35_trt.checkpoint import Checkpoint
    from step35_trt.weight_forms import WeightForm

SHAPE = (48, 96)
NAME = "model.layers.0.self_attn.q_proj.weight"


def form_of(kind: str, block: int, name: str = NAME, shape: tuple[int, ...] = SHAPE) -> WeightForm:
    return Forms({name: shape}, lambda _: Coding(kind, block), "bfloat16")(name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "block", "bits", "error"),
    [
        ("bf16", 0, 16, 2**-8),
        ("fp8-rows", 0, 8, 2**-4),
        ("fp8-blocks", 32, 8, 2**-4),  # a block at the edge is cut
        ("int4", 32, 4, 1 / 7.9),
    ],
)
def test_a_packed_weight_decodes_to_itself(kind: str, block: int, bits: int, error: float) -> None:
    weight = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    form = form_of(kind, block)
    packed = pack(weight, form)
    assert packed.values.nbytes == weight.size * bits // 8
    assert form.nbytes == packed.values.nbytes + (0 if packed.scales is None else packed.scales.nbytes)
    decoded = unpack(packed, form)
    # Floating codes err by a share of the value, integers by one of the block's largest.
    scale = np.abs(weight).max() if kind == "int4" else np.abs(weight) + 0.02
    assert (np.abs(decoded - weight) <= error * scale).all()
    assert np.abs(decoded - weight).max() > 0


def test_int4_lies_as_tensorrt_reads_it() -> None:
    """The first value of a pair in the low half, two's complement."""
    form = form_of("int4", 16, shape=(1, 16))
    weight = np.array([[-8, 7, -1, 1, *[0] * 12]], np.float32)
    packed = pack(weight, form)
    scale = float(packed.scales[0, 0])  # type: ignore[index]
    assert scale == 1
    assert packed.values[0, :2].tolist() == [0x78, 0x1F]
    np.testing.assert_array_equal(unpack(packed, form), weight)


@pytest.mark.parametrize("name", ["a.k_norm.weight", "model.layers.3.moe.gate.weight"])
def test_vectors_and_the_router_stay_fp32(name: str) -> None:
    shape = (96,) if "norm" in name else SHAPE
    assert form_of("int4", 32, name, shape).dtype == "float32"


def test_only_rows_are_read_in_int8() -> None:
    form = form_of("int8", 32, "model.embed_tokens.weight")
    assert (form.dtype, form.scale_shape, form.row_bytes) == ("int8", (48, 3), 96 + 12)
    with pytest.raises(UnsupportedError, match=r"q_proj.weight is coded in int8"):
        form_of("int8", 32)
    with pytest.raises(UnsupportedError, match=r"embed_tokens.weight is coded in int4"):
        form_of("int4", 32, "model.embed_tokens.weight")


def test_an_unknown_weight_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"no weight model.nothing"):
        Forms({}, lambda _: Coding("bf16"), "bfloat16")("model.nothing")


@dataclass
class Quantised:
    """A checkpoint with one coded parameter."""

    name: str
    coding: Coding
    parameter: tuple[int, ...]
    tensors: dict[str, NDArray[np.generic]]

    @property
    def codings(self) -> dict[str, Coding]:
        return {self.name: self.coding}

    def shape(self, _: str) -> tuple[int, ...]:
        return self.parameter

    def stored(self, name: str) -> NDArray[np.generic]:
        return self.tensors[name]

    def read(self, name: str, rows: int | None = None) -> NDArray[np.float32]:
        part = slice(0, self.parameter[0]) if rows is None else slice(rows, rows + 1)
        values = decode(self.coding, name, self.parameter, self.stored, part)
        return values.reshape(self.parameter) if rows is None else values[0]


def quantised(kind: str, shape: tuple[int, ...], block: int) -> Quantised:
    rng = np.random.default_rng(3)
    coding = Coding(kind, block)  # type: ignore[arg-type]
    tensors: dict[str, NDArray[np.generic]] = {}
    numpy = {"U8": np.uint8, "I8": np.int8, "F16": np.float16, "F32": np.float32}
    for name, (dtype, size) in coding.entries(NAME, shape).items():
        if dtype in ("F16", "F32"):
            # Powers of two and negative ones: exact in every type of scale.
            tensors[name] = (-(2.0 ** rng.integers(-6, 0, size))).astype(numpy[dtype])
        elif dtype == "F8_E4M3":
            tensors[name] = rng.normal(size=size).astype(ml_dtypes.float8_e4m3fn)
        else:
            tensors[name] = rng.integers(0, 256, size).astype(np.uint8).view(numpy[dtype])
    return Quantised(NAME, coding, shape, tensors)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(("kind", "block"), [("int4", 32), ("fp8-rows", 0), ("fp8-blocks", 32)])
def test_codes_of_a_checkpoint_are_kept(kind: str, block: int, stacked: bool) -> None:
    """Nothing is rounded a second time: both decode to the same values."""
    source = quantised(kind, (3, *SHAPE) if stacked else SHAPE, block)
    form = form_of(kind, block, shape=source.parameter)
    expert = 1 if stacked else None
    packed = packed_weight(cast("Checkpoint", source), NAME, form, expert)
    np.testing.assert_array_equal(unpack(packed, form), source.read(NAME, expert))


def test_another_block_is_packed_anew() -> None:
    source = quantised("int4", SHAPE, 16)
    form = form_of("int4", 32)
    packed = packed_weight(cast("Checkpoint", source), NAME, form)
    assert packed.scales is not None
    assert packed.scales.shape == (48, 3)
    difference = np.abs(unpack(packed, form) - source.read(NAME))
    assert 0 < difference.max() <= np.abs(source.read(NAME)).max() / 7.9
