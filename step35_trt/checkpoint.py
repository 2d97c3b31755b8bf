"""A Step 3.5 checkpoint on disk: names, shapes, and values read slice by slice (specification section 4)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open

from step35_trt.config import LayerSpec, Step35Config
from step35_trt.errors import CorruptInputError, UnsupportedError
from step35_trt.quantize import formats
from step35_trt.quantize.declared import Fp8Blocks
from step35_trt.quantize.formats import DTYPES, Coding
from step35_trt.weight_file import mapped

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

EXPERT_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
MAX_HEADER_BYTES = 100 << 20  # the format's own limit


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: file, byte offset from its start, dtype as safetensors spells it, shape."""

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size on disk in bytes."""
        return math.prod(self.shape) * int(DTYPES[self.dtype].itemsize)


def expected_tensors(config: Step35Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the bf16 checkpoint, decoder first, MTP modules after it."""
    d, vocabulary = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, d)}
    for layer in config.layers:
        shapes.update(_block(config, layer))
    shapes["model.norm.weight"] = (d,)
    shapes["lm_head.weight"] = (vocabulary, d)
    for layer in config.mtp_layers:
        shapes.update(_block(config, layer))
        p = layer.prefix
        shapes[f"{p}.enorm.weight"] = (d,)
        shapes[f"{p}.hnorm.weight"] = (d,)
        shapes[f"{p}.eh_proj.weight"] = (d, 2 * d)
        shapes[f"{p}.transformer.shared_head.norm.weight"] = (d,)
        shapes[f"{p}.transformer.shared_head.output.weight"] = (vocabulary, d)
    return shapes


def _block(config: Step35Config, layer: LayerSpec) -> dict[str, tuple[int, ...]]:
    d, p, head = config.hidden_size, layer.prefix, layer.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        f"{p}.input_layernorm.weight": (d,),
        f"{p}.self_attn.q_proj.weight": (layer.query_heads * head, d),
        f"{p}.self_attn.k_proj.weight": (layer.kv_heads * head, d),
        f"{p}.self_attn.v_proj.weight": (layer.kv_heads * head, d),
        f"{p}.self_attn.g_proj.weight": (layer.query_heads, d),
        f"{p}.self_attn.o_proj.weight": (d, layer.query_heads * head),
        f"{p}.self_attn.q_norm.weight": (head,),
        f"{p}.self_attn.k_norm.weight": (head,),
        f"{p}.post_attention_layernorm.weight": (d,),
    }

    def mlp(where: str, width: int, leading: tuple[int, ...] = ()) -> None:
        shapes[f"{where}.gate_proj.weight"] = (*leading, width, d)
        shapes[f"{where}.up_proj.weight"] = (*leading, width, d)
        shapes[f"{where}.down_proj.weight"] = (*leading, d, width)

    if layer.moe:
        shapes[f"{p}.moe.gate.weight"] = (config.moe_num_experts, d)
        shapes[f"{p}.moe.router_bias"] = (config.moe_num_experts,)
        mlp(f"{p}.moe", config.moe_intermediate_size, (config.moe_num_experts,))
        mlp(f"{p}.share_expert", config.share_expert_dim)
    else:
        mlp(f"{p}.mlp", config.intermediate_size)
    return shapes


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Nothing is read before it is asked for, and nothing stays mapped after.

    Attributes:
        directory: Where `config.json` lies.
        config: The model.
        tensors: Every stored tensor by its published name, scales included (see `quantize.formats`).
        codings: How each parameter of the model is stored.
    """

    directory: Path
    config: Step35Config
    tensors: dict[str, StoredTensor]
    codings: dict[str, Coding]

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Read the headers and check that the checkpoint is whole.

        Raises:
            CorruptInputError: a shard or tensor is missing or damaged, a shape or dtype is off.
            UnsupportedError: the model is not one this compiler knows.
        """
        config = Step35Config.load(directory)
        tensors: dict[str, StoredTensor] = {}
        for file in _shards(directory):
            tensors.update(_header(file))
        return cls(directory, config, tensors, _codings(config, tensors))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(t.nbytes for t in self.tensors.values())

    def identity(self) -> list[object]:
        """What tells this checkpoint from another without reading its weights; goes into JSON."""
        files = sorted({tensor.file for tensor in self.tensors.values()})
        return [
            (self.directory / "config.json").read_text(encoding="utf-8"),
            {n: [t.file.name, t.offset, t.dtype, t.shape] for n, t in sorted(self.tensors.items())},
            [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        ]

    def shape(self, name: str) -> tuple[int, ...]:
        """A parameter's shape in the model, however it is stored."""
        stored = self.tensors[name].shape
        if self.codings[name].kind != "int4":
            return stored
        # Two rows a byte: how many rows there are, the scales know.
        return (*self.tensors[f"{name}_scale"].shape[:-1], stored[-1])

    def stored(self, name: str) -> NDArray[np.generic]:
        """A tensor as stored: a read-only view of the file, unmapped when the array dies."""
        tensor = self.tensors[name]
        return mapped(tensor.file, DTYPES[tensor.dtype], tensor.offset, tensor.shape)

    def codes(
        self, name: str, rows: slice, bits: int, block: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.floating]] | None:
        """A slice's own codes in the form of `quantize.blocks.quantize_blocks`.

        None where they are of another width, or have scales that blocks of `block` would not share.
        """
        coding = self.codings[name]
        if coding.kind != f"int{bits}" or coding.block % block:
            return None
        shape = self.shape(name)
        part = slice(*rows.indices(shape[0]))
        return formats.engine_codes(coding, name, shape, self.stored, part, block)

    def read(self, name: str, rows: slice | int | None = None) -> NDArray[np.float32]:
        """A parameter, or a slice along its first axis, as fp32 in memory.

        Codes are multiplied by their scales; for stacked experts `rows` selects experts.
        """
        coding = self.codings[name]
        if coding.kind in ("fp32", "bf16"):
            values = self.stored(name)[... if rows is None else rows]
            plain: NDArray[np.float32] = values.astype(np.float32)
            return plain
        shape = self.shape(name)
        if isinstance(rows, int):
            one: NDArray[np.float32] = self.read(name, slice(rows, rows + 1))[0]
            return one
        part = slice(*(slice(None) if rows is None else rows).indices(shape[0]))
        return formats.decode(coding, name, shape, self.stored, part)


def _shards(directory: Path) -> Iterator[Path]:
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise CorruptInputError(f"{directory} holds no safetensors file")
        yield from files
        return
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CorruptInputError(f"{index} is not a safetensors index") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CorruptInputError(f"{index} points outside its directory: {name!r}")
        if not (directory / name).is_file():
            raise CorruptInputError(f"shard {name} is missing from {directory}", "Download it again.")
        yield directory / name


def _header(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, "numpy"):  # checks the JSON, the ranges and that the file has all its bytes
            pass
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(size, MAX_HEADER_BYTES)))
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptInputError(
            f"{file.name} is damaged or truncated ({error})", "Download it again."
        ) from None
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            if name.startswith(("model.", "lm_head.")):
                raise UnsupportedError(
                    f"{name} has dtype {entry['dtype']}, which this compiler does not read"
                )
            continue
        offset = 8 + size + entry["data_offsets"][0]
        found[name] = StoredTensor(file, offset, entry["dtype"], tuple(entry["shape"]))
    return found


def _codings(config: Step35Config, tensors: dict[str, StoredTensor]) -> dict[str, Coding]:
    expected = expected_tensors(config)
    missing = [name for name in expected if name not in tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        mtp = missing[0].startswith(tuple(f"{layer.prefix}." for layer in config.mtp_layers))
        hint = "The MTP modules are part of the model; take a checkpoint that still has them." if mtp else ""
        raise CorruptInputError(f"the checkpoint lacks {missing[0]}{more}", hint)
    stored = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    declared = config.quantization_config
    block = declared.block if isinstance(declared, Fp8Blocks) else None
    return {name: formats.detect(name, shape, stored, block) for name, shape in expected.items()}
