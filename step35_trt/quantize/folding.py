"""Exact changes of a checkpoint's weights before they are quantised, applied while they are read.

A calibration finds factors that move magnitude from one weight into another without changing what the model
computes (AWQ, arXiv 2306.00978). They are kept as data, a `Folding`, and `Folded` shows a checkpoint as if
its weights had been stored so:

    W' = diag(rows) W diag(columns)             a matrix; a stacked one expert by expert
    w' = (w + 1) * rows - 1                     a norm: the checkpoint stores gamma - 1 (specification 2.2)

all in fp32. A product whose input was divided by s by the norm before it thus has `columns = s`, the norm
`rows = 1 / s`. Clipping rides along: it concerns how a group is quantised, not what the model computes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Protocol

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from step35_trt.errors import CorruptInputError
from step35_trt.journal import replacing

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from step35_trt.checkpoint import StoredTensor
    from step35_trt.config import Step35Config

# What a group's largest magnitude is multiplied with before its scale is computed, by the index in
# `Scaling.clip`: 1, 31/32 .. 1/2, each exact in fp16. Cutting more of a group's range is never worth it.
CLIP_RATIOS = (1 - np.arange(17, dtype=np.float32) / 32).astype(np.float32)


class TensorSource(Protocol):
    """What a weight can be read from: a `Checkpoint`, or one with a folding over it."""

    @property
    def directory(self) -> Path:
        """Where `config.json` and the tokenizer lie."""

    @property
    def config(self) -> Step35Config:
        """The model."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """What is stored, by published name; a quantised weight's shape here is that of its codes."""

    def shape(self, name: str) -> tuple[int, ...]:
        """A parameter's shape in the model (`checkpoint.expected_tensors`), however it is stored."""

    def read(self, name: str, rows: slice | int | None = None) -> NDArray[np.float32]:
        """A parameter, or a slice along its first axis, as fp32."""


@dataclass(frozen=True, eq=False)
class Scaling:
    """What happens to one parameter of shape `[N, K]`, `[E, N, K]` or `[D]`; None leaves a side as it is.

    Attributes:
        rows: fp32 `[N]`, `[E, N]` for stacked experts, `[D]` for a vector: factors of the outputs.
        columns: fp32 `[K]`, or `[E, K]` where each expert has its own: factors of the inputs.
        clip: uint8 `[..., N, K / group]`: indices into `CLIP_RATIOS`, 0 clips nothing.
    """

    rows: NDArray[np.float32] | None = None
    columns: NDArray[np.float32] | None = None
    clip: NDArray[np.uint8] | None = None

    def applied(
        self, values: NDArray[np.float32], rank: int, part: slice | int | None = None
    ) -> NDArray[np.float32]:
        """Values of the parameter, or of a slice of them along its first axis, with the factors.

        Args:
            values: As read.
            rank: Axes of the whole parameter.
            part: Which slice the values are.
        """
        cut = ... if part is None else part
        if rank == 1:
            if self.rows is None:
                return values
            return (values + np.float32(1)) * self.rows[cut] - np.float32(1)
        if self.rows is not None:  # [N] or [E, N]: as many axes as the weight has before its inputs
            values = values * self.rows[cut][..., None]
        if self.columns is not None:
            own = self.columns.ndim == 2  # [E, K]: sliced with the experts, alike for all rows of one
            values = values * (self.columns[cut][..., None, :] if own else self.columns)
        return values


@dataclass(frozen=True, eq=False)
class Folding:
    """Scalings by published parameter name; what has no entry stays as it is."""

    scalings: Mapping[str, Scaling] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write one safetensors file: `NAME.rows`, `NAME.columns` and `NAME.clip` where they are set."""
        with replacing(path) as stream:
            stream.write(save(dict(self._arrays())))

    @classmethod
    def load(cls, path: Path) -> Folding:
        """Read what `save` wrote.

        Raises:
            CorruptInputError: the file is damaged or is not a folding.
        """
        sides: dict[str, dict[str, NDArray[np.generic]]] = {}
        try:
            arrays = load_file(path)
        except (SafetensorError, OSError) as error:
            raise CorruptInputError(f"{path} is not a folding ({error})") from None
        for key, value in arrays.items():
            name, _, side = key.rpartition(".")
            if value.dtype != {"rows": np.float32, "columns": np.float32, "clip": np.uint8}.get(side):
                raise CorruptInputError(f"{path} is not a folding: {key} is {value.dtype}")
            sides.setdefault(name, {})[side] = value
        return cls({name: Scaling(**sides[name]) for name in sorted(sides)})  # type: ignore[arg-type]

    def digest(self) -> str:
        """Hexadecimal BLAKE2b of all factors: equal foldings have equal digests."""
        digest = hashlib.blake2b(digest_size=16)
        for key, value in self._arrays():
            digest.update(f"{key} {value.dtype} {value.shape}\0".encode() + value.tobytes())
        return digest.hexdigest()

    def _arrays(self) -> Iterator[tuple[str, NDArray[np.generic]]]:
        # One by one: all clips of the whole model are 1.5 GB.
        for name in sorted(self.scalings):
            scaling = self.scalings[name]
            for side in fields(Scaling):
                if (value := getattr(scaling, side.name)) is not None:
                    yield f"{name}.{side.name}", np.ascontiguousarray(value)


@dataclass(frozen=True)
class Folded:
    """A checkpoint seen through a folding; it reads as the checkpoint does."""

    checkpoint: TensorSource
    folding: Folding

    @property
    def directory(self) -> Path:
        """Where `config.json` and the tokenizer lie."""
        return self.checkpoint.directory

    @property
    def config(self) -> Step35Config:
        """The model."""
        return self.checkpoint.config

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """What is stored, before the folding."""
        return self.checkpoint.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """A parameter's shape; a folding changes none."""
        return self.checkpoint.shape(name)

    def read(self, name: str, rows: slice | int | None = None) -> NDArray[np.float32]:
        """A parameter, or a slice along its first axis, with its factors applied in fp32."""
        values = self.checkpoint.read(name, rows)
        scaling = self.folding.scalings.get(name)
        return values if scaling is None else scaling.applied(values, len(self.shape(name)), rows)
