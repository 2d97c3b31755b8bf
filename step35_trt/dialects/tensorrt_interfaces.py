"""What each kernel reads, writes and is launched with in TensorRT, as `launch.py` of its plugin does it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from step35_trt.dialects.tensorrt_plugins import Interface, Output
from step35_trt.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from step35_trt.dialects.tensorrt_plugins import Extents
    from step35_trt.kernels.variant import KernelVariant

_SEQUENCES = ("starts", "pasts", "table", "key_scale", "value_scale")
_TILES = ("order", "tiles")
_IN_PLACE = Output()


@dataclass(frozen=True)
class Layer:
    """What a layer's experts fix besides what is compiled in.

    Attributes:
        stack: Matrices in a stack, the shared expert included.
        limit_bits: `sparse_moe.launch.limit_bits` of the routed and of the shared experts.
    """

    stack: int = 0
    limit_bits: tuple[int, int] = (0, 0)

    @property
    def limits(self) -> dict[str, Callable[[Extents], Any]]:
        """As integers of a kernel."""
        routed, shared = self.limit_bits
        return {"limit_bits": lambda _: routed, "shared_limit_bits": lambda _: shared}


def interface(variant: KernelVariant, layer: Layer = Layer()) -> Interface:
    """The interface of a kernel.

    Args:
        variant: What is compiled; its constants are the shapes that do not vary.
        layer: For kernels of the experts.

    Raises:
        UnsupportedError: the kernel runs in no engine.
    """
    if variant.function not in _INTERFACES:
        raise UnsupportedError(f"{variant.plugin}/{variant.function} runs in no TensorRT engine")
    constants = {name: value for name, value in variant.constants.items() if isinstance(value, int)}
    return _INTERFACES[variant.function](constants, layer)


def _prepare(c: dict[str, int], _: Layer) -> Interface:
    heads = c["KV_HEADS"] * c["SHARE"]
    return Interface(
        ("q", "k", "v", "q_gamma", "k_gamma", "frequencies", "token_sequence", *_SEQUENCES, "keys", "values"),
        {"queries": Output(lambda d: (d("q", 0), heads, c["D"])), "keys": _IN_PLACE, "values": _IN_PLACE},
        {"table_pages": lambda d: d("table", 1)},
        lambda d: (d("q", 0), c["KV_HEADS"]),
    )


def _decode(c: dict[str, int], _: Layer) -> Interface:
    heads, splits = c["KV_HEADS"] * c["SHARE"], c["SPLITS"]
    if splits == 1:
        outputs = {"out": Output(lambda d: (d("queries", 0), heads * c["D"]))}
    else:
        part = c["QUERIES"] * heads * splits
        outputs = {
            "partial": Output(lambda d: (d("table", 0) * part, c["D"])),
            "partial_state": Output(lambda d: (d("table", 0) * part, 2)),
        }
    return Interface(
        ("queries", "keys", "values", "gate", *_SEQUENCES),
        outputs,
        {"table_pages": lambda d: d("table", 1)},
        lambda d: (splits, c["KV_HEADS"], d("table", 0)),
    )


def _reduce(c: dict[str, int], _: Layer) -> Interface:
    return Interface(
        ("partial", "partial_state", "gate", "starts", "pasts"),
        {"out": Output(lambda d: (d("gate", 0), c["HEADS"] * c["D"]))},
        {},
        lambda d: (c["HEADS"], c["QUERIES"], d("pasts", 0)),
    )


def _prefill(c: dict[str, int], _: Layer) -> Interface:
    heads = c["KV_HEADS"] * c["SHARE"]
    return Interface(
        ("queries", "keys", "values", "gate", "blocks", *_SEQUENCES),
        {"out": Output(lambda d: (d("queries", 0), heads * c["D"]))},
        {"table_pages": lambda d: d("table", 1)},
        lambda d: (heads // c["HEADS"], d("blocks", 0)),
    )


def _route_logits(c: dict[str, int], _: Layer) -> Interface:
    return Interface(
        ("logits", "bias"),
        {name: Output(lambda d: (d("logits", 0), c["SLOTS"])) for name in ("ids", "mix")},
        {},
        lambda d: (d("logits", 0),),
    )


def _few_gate_up(c: dict[str, int], layer: Layer) -> Interface:
    return Interface(
        ("x", "ids", "gate", "gate_scales", "up", "up_scales"),
        {"hidden": Output(lambda d: (d("x", 0) * c["SLOTS"], c["INNER"]))},
        layer.limits,
        lambda d: (d("x", 0) * c["SLOTS"], -(-c["INNER"] // c["ROWS"])),
    )


def _few_down(c: dict[str, int], _: Layer) -> Interface:
    return Interface(
        ("hidden", "ids", "mix", "down", "down_scales"),
        {"y": Output(lambda d: (d("ids", 0), c["D"]))},
        {},
        lambda d: (d("ids", 0), -(-c["D"] // c["ROWS"])),
    )


def _count_pairs(_: dict[str, int], layer: Layer) -> Interface:
    return Interface(
        ("ids",),
        {"counts": Output(lambda d: (layer.stack,))},
        {"pairs": _pairs},
        lambda d: (layer.stack,),
    )


def _place_pairs(c: dict[str, int], _: Layer) -> Interface:
    def most(d: Extents) -> Any:
        """`sparse_moe.geometry.most_tiles`."""
        return d.least(_pairs(d), _pairs(d) // c["TOKENS"] + c["ALL"])

    return Interface(
        ("ids", "counts"),
        {"order": Output(lambda d: (_pairs(d),)), "tiles": Output(lambda d: (most(d) * 3 + 1,))},
        {"pairs": _pairs, "most_tiles": most},
        lambda d: (c["ALL"],),
    )


def _grouped_gate_up(c: dict[str, int], layer: Layer) -> Interface:
    return Interface(
        ("x", *_TILES, "gate", "gate_scales", "up", "up_scales"),
        {"hidden": Output(lambda d: (d("order", 0), c["INNER"]))},
        {**layer.limits, "most_tiles": _most_tiles},
        lambda d: (-(-c["INNER"] // c["ROWS"]), _most_tiles(d)),
    )


def _grouped_down(c: dict[str, int], _: Layer) -> Interface:
    return Interface(
        ("hidden", *_TILES, "mix", "down", "down_scales"),
        {"partial": Output(lambda d: (d("order", 0), c["D"]))},
        {"most_tiles": _most_tiles},
        lambda d: (-(-c["D"] // c["ROWS"]), _most_tiles(d)),
    )


def _combine(c: dict[str, int], _: Layer) -> Interface:
    return Interface(
        ("partial",),
        {"y": Output(lambda d: (d("partial", 0) // c["SLOTS"], c["D"]))},
        {},
        lambda d: (d("partial", 0) // c["SLOTS"], -(-c["D"] // c["BLOCK"])),
    )


def _pairs(d: Extents) -> Any:
    return d("ids", 0) * d("ids", 1)


def _most_tiles(d: Extents) -> Any:
    return (d("tiles", 0) - 1) // 3


_INTERFACES: dict[str, Callable[[dict[str, int], Layer], Interface]] = {
    "prepare": _prepare,
    "decode": _decode,
    "reduce": _reduce,
    "prefill": _prefill,
    "route_logits": _route_logits,
    "few_gate_up": _few_gate_up,
    "few_down": _few_down,
    "count_pairs": _count_pairs,
    "place_pairs": _place_pairs,
    "grouped_gate_up": _grouped_gate_up,
    "grouped_down": _grouped_down,
    "combine": _combine,
}
