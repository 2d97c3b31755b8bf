"""The vocabulary in which the model is written. A dialect says how each word is spelled.

`T` is a dialect's activation: packed tokens `[tokens, features]`; only `gated_attention` knows which tokens
belong to which sequence. `V` is a vector parameter, fp32, to which plain arithmetic applies. Large weights
are named as the checkpoint names them and never pass through the model's hands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from step35_trt.config import LayerSpec

T = TypeVar("T")
V = TypeVar("V")


class Ops(Protocol[T, V]):
    """What a dialect implements. Shapes: t tokens, D hidden, H query heads, G KV heads, d head, E experts."""

    def vector(self, name: str) -> V:
        """A one-dimensional parameter in fp32."""
        ...

    def plus_one(self, vector: V) -> V:
        """`vector + 1` in fp32: norms are stored as gamma - 1 (specification 2.2)."""
        ...

    def embedding(self, token_ids: T, weight: str) -> T:
        """`[t]` ids to `[t, D]`."""
        ...

    def rows(self, x: T, index: T) -> T:
        """Select rows: `[t, D]`, `[r]` to `[r, D]`."""
        ...

    def concat(self, a: T, b: T) -> T:
        """Side by side: `[t, A]`, `[t, B]` to `[t, A + B]`."""
        ...

    def add(self, a: T, b: T) -> T:
        """Elementwise sum, in the activation type."""
        ...

    def linear(self, x: T, weight: str) -> T:
        """`x Wᵀ`, W `[out, in]`: `[t, in]` to `[t, out]`."""
        ...

    def linear_fp32(self, x: T, weight: str) -> T:
        """As `linear`, inputs, weight and result in fp32 (specification 2.8)."""
        ...

    def bias(self, x: T, vector: V) -> T:
        """`x + vector`, fp32 `[t, n]`."""
        ...

    def sigmoid(self, x: T) -> T:
        """Elementwise."""
        ...

    def swiglu(self, gate: T, up: T, limit: float) -> T:
        """`min(silu(gate), limit) * clamp(up, -limit, limit)`; limit 0 is none (specification 2.7)."""
        ...

    def rms_norm(self, x: T, gamma: V, eps: float) -> T:
        """`x / rms(x) * gamma` over the last axis, inside in fp32."""
        ...

    def gated_attention(
        self, q: T, k: T, v: T, gate: T, q_gamma: V, k_gamma: V, eps: float, layer: LayerSpec
    ) -> T:
        """Plugin 1: q/k norm, rotary, cache write, causal (windowed) attention, one sigmoid gate a head.

        `q [t, H*d]`, `k, v [t, G*d]`, `gate [t, H]` logits, `q_gamma, k_gamma [d]` to `[t, H*d]`
        (specification 2.4). Query head j reads KV head `j // (H/G)`; key j is seen from p when
        `p - window < j <= p`.
        """
        ...

    def sparse_moe(
        self, x: T, selection: T, weights: T, experts: str, top_k: int, scale: float, limit: float
    ) -> T:
        """Plugin 2: the `top_k` experts with the highest `selection`, mixed by `weights`.

        `x [t, D]`, `selection, weights [t, E]` fp32 to `[t, D]`. The chosen weights are divided by their sum
        and multiplied by `scale`; each expert is a `swiglu` MLP under `{experts}.{gate,up,down}_proj.weight`
        (specification 2.8, 2.9).
        """
        ...
