"""What a layer fixes and what a kernel is specialised on: one place for launching and for compiling ahead."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from step35_trt.kernels.tactics import choose

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from step35_trt.config import LayerSpec
    from step35_trt.kernels.tactics import Tactic
    from step35_trt.kernels.variant import Constant

PLUGIN = "gated_attention"
PAGE = 128  # rows of a page in a deployment: the widest tile of keys, so that a tile lies in one page
QUERIES = 4  # new tokens of a sequence that a deployment decodes at most: a token and three drafts


@dataclass(frozen=True)
class Geometry:
    """Attributes of attention that are compiled in.

    Attributes:
        query_heads: H; query head j reads KV head `j // (H / G)`.
        kv_heads: G.
        head_dim: d, a power of two from 16.
        window: Keys that a query sees including its own; 0 is all.
        rotary_dims: Leading dimensions of a head that turn, even.
        eps: Of the q and k norms.
        page: Rows of a cache page, a power of two.
        queries: The most new tokens of a sequence that `decode` takes (drafts + 1); more go to `prefill`.
            A constant of the deployment: it decides a tile's shape, and so the bits of a result.
    """

    query_heads: int
    kv_heads: int
    head_dim: int
    window: int
    rotary_dims: int
    eps: float
    page: int = PAGE
    queries: int = QUERIES

    @classmethod
    def of(cls, layer: LayerSpec, eps: float, queries: int, page: int = PAGE) -> Geometry:
        """The geometry of a model's layer."""
        return cls(
            layer.query_heads,
            layer.kv_heads,
            layer.head_dim,
            layer.window,
            layer.rotary_dims,
            eps,
            page,
            queries,
        )

    @property
    def share(self) -> int:
        """Query heads of a KV head."""
        return self.query_heads // self.kv_heads

    @property
    def ring_rows(self) -> int:
        """Rows a window layer's page table must span so that drafts can be taken back (see README)."""
        return self.window + self.queries - 1


def power(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()


def tactic(entries: Sequence[Tactic], kernel: str, geometry: Geometry, kv_bits: int) -> Tactic:
    """The tiling of `kernel`; it depends on what is compiled in and never on a batch.

    Raises:
        UnsupportedError: no entry admits the geometry.
    """
    problem = {
        "kv_heads": geometry.kv_heads,
        "share": geometry.share,
        "head_dim": geometry.head_dim,
        "window": geometry.window,
        "page": geometry.page,
        "queries": geometry.queries,
        "kv_bits": kv_bits,
    }
    return choose(entries, kernel, problem)


def constants(kernel: str, geometry: Geometry, tiling: Mapping[str, Constant]) -> dict[str, Constant]:
    """Every `tl.constexpr` of `kernel`; `tiling` are those that the tactic decides.

    `SPLITS` belongs to `decode` and is taken over by `reduce`.
    """
    dim, share, queries = geometry.head_dim, geometry.share, geometry.queries
    # exp2 takes the place of exp: the logarithm's base goes into the scale of the scores.
    scale = math.log2(math.e) / math.sqrt(dim)
    rest = dim - geometry.rotary_dims
    given: dict[str, dict[str, Constant]] = {
        "prepare": {
            "KV_HEADS": geometry.kv_heads,
            "SHARE": share,
            "ROWS": power(share),
            "D": dim,
            "PAIRS": geometry.rotary_dims // 2,
            "PAIRS_TILE": power(geometry.rotary_dims // 2),
            "REST_TILE": power(rest) if rest else 0,
            "D_TILE": power(dim),
            "PAGE": geometry.page,
            "EPS": geometry.eps,
        },
        "decode": {
            "KV_HEADS": geometry.kv_heads,
            "SHARE": share,
            "QUERIES": queries,
            "ROWS": power(queries * share),
            "D": dim,
            "WINDOW": geometry.window,
            "PAGE": geometry.page,
            "SCALE": scale,
        },
        "reduce": {
            "HEADS": geometry.query_heads,
            "QUERIES": queries,
            "D": dim,
            "WINDOW": geometry.window,
        },
        "prefill": {
            "KV_HEADS": geometry.kv_heads,
            "SHARE": share,
            "D": dim,
            "WINDOW": geometry.window,
            "PAGE": geometry.page,
            "SCALE": scale,
        },
    }
    return given[kernel] | dict(tiling)
