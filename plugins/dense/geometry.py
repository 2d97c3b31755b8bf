"""How dense algebra is tiled and what is compiled in: one place for launching and for compiling ahead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from step35_trt.kernels.variant import Constant

    from ..sparse_moe.pack import Format

PLUGIN = "dense"
KERNELS: Mapping[str, str] = {
    "few_linear": "linear",
    "linear": "linear",
    "rms_norm": "rows",
    "swiglu": "rows",
}
"""Each kernel and the file that holds it."""

FEW = 16  # tokens whose activations lie in one tile beside the weights
BLOCK_K = 128
BLOCK = 1024  # features of a block of `swiglu`


@dataclass(frozen=True)
class Tiling:
    """Of a product.

    Attributes:
        kernel: `few_linear` or `linear`.
        most: Tokens that it is for at most; fewer than the tiling before it takes are that one's.
        rows: Output features of a block.
        tokens: Tokens of a block.
        splits: Groups that share out the input features; 0 where the kernel knows none.
        num_warps: Warps of a block.
        num_stages: Depth of the pipeline.
    """

    kernel: str
    most: int
    rows: int
    tokens: int
    splits: int
    num_warps: int
    num_stages: int

    def constants(self, n: int, k: int, kind: Format, *, interpreted: bool) -> dict[str, Constant]:
        """All `tl.constexpr` arguments for a matrix `[n, k]`."""
        fixed: dict[str, Constant] = {
            "N": n,
            "K": k,
            "FORMAT": kind,
            "ROWS": self.rows,
            "TOKENS": self.tokens,
            "BLOCK_K": BLOCK_K,
            "STAGES": self.num_stages,
            "INTERPRETED": interpreted,
        }
        return fixed | {"SPLITS": self.splits} if self.splits else fixed


# No measurement stands behind these: few rows and many splits, since one token's matrix has to be read by all
# multiprocessors at once; square tiles where tokens are many. For some tens of tokens a matrix is read as if
# they were few.
TILINGS = (
    *(Tiling("few_linear", tokens, 16, tokens, 4, 4, 3) for tokens in (2, 4, 8, FEW)),
    Tiling("linear", 128, 32, 64, 0, 4, 3),
    Tiling("linear", 1 << 30, 128, 64, 0, 8, 3),
)


def tiling(tokens: int) -> Tiling:
    """Of a product with so many tokens, at least one."""
    return next(tiling for tiling in TILINGS if tokens <= tiling.most)


def norm_constants(width: int, eps: float) -> dict[str, Constant]:
    """All `tl.constexpr` arguments of `rms_norm`."""
    return {"D": width, "EPS": eps, "BLOCK": 1 << (width - 1).bit_length()}


def gate_constants(width: int) -> dict[str, Constant]:
    """All `tl.constexpr` arguments of `swiglu`."""
    return {"WIDTH": width, "BLOCK": BLOCK}


NORM_WARPS, GATE_WARPS, ROW_STAGES = 8, 4, 1
