"""The torch dialect: the vocabulary in plain PyTorch, the definition every other dialect is held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from step35_trt.rotary import inverse_frequencies

if TYPE_CHECKING:
    from step35_trt.config import LayerSpec


class Weights(Protocol):
    """Where the dialect finds parameters."""

    def tensor(self, name: str) -> Tensor:
        """A whole parameter."""
        ...

    def expert(self, name: str, index: int) -> Tensor:
        """One expert's matrix of a stacked parameter."""
        ...


class HeldWeights(Protocol):
    """`Weights` of one rank of several."""

    def tensor(self, name: str) -> Tensor:
        """A whole parameter, or the rank's share of it."""
        ...

    def expert(self, name: str, index: int) -> Tensor | None:
        """As `Weights`; None where another rank holds the expert."""
        ...


class Rows(Protocol):
    """What is kept of one layer and sequence, a row a token."""

    def truncate(self, length: int) -> None:
        """Keep the first `length` rows."""
        ...


@dataclass
class LayerCache:
    """Keys and values of one layer and sequence, normed and rotated: `[rows, G, d]`; nothing is evicted."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add rows; returns all rows."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys]), torch.cat([self.values, values])
        self.keys, self.values = keys, values
        return keys, values

    def truncate(self, length: int) -> None:
        """Keep the first `length` rows."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[:length], self.values[:length]


@dataclass(frozen=True)
class SequenceBatch:
    """Which packed tokens belong to which sequence.

    `lengths` new tokens of each sequence, in order; `pasts` rows it has already; `caches[i]` maps a layer's
    index to its cache, or is None where nothing is to be kept.
    """

    lengths: tuple[int, ...]
    pasts: tuple[int, ...]
    caches: tuple[dict[int, Any] | None, ...]  # of `LayerCache`, or of what the kernels keep

    @classmethod
    def fresh(cls, *lengths: int) -> SequenceBatch:
        """Sequences without past or cache."""
        return cls(lengths, (0,) * len(lengths), (None,) * len(lengths))


class Kernels(Protocol):
    """The two plugins as GPU kernels; arguments as the words of `Ops` have them."""

    def gated_attention(
        self,
        batch: SequenceBatch,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor,
        q_gamma: Tensor,
        k_gamma: Tensor,
        eps: float,
        layer: LayerSpec,
    ) -> Tensor:
        """See `Ops`; the caches are the kernels' own kind of `Rows`."""
        ...

    def sparse_moe(
        self,
        x: Tensor,
        selection: Tensor,
        weights: Tensor,
        experts: str,
        top_k: int,
        scale: float,
        limit: float,
    ) -> Tensor:
        """See `Ops`."""
        ...


@dataclass(frozen=True)
class TorchOps:
    """`Ops[Tensor, Tensor]` over `weights`, for the tokens described by `batch`.

    With `kernels` the plugins run as them, else as the definition that stands here.
    """

    weights: HeldWeights
    batch: SequenceBatch
    kernels: Kernels | None = None

    def vector(self, name: str) -> Tensor:
        """See `Ops`."""
        return self.weights.tensor(name).float()

    def plus_one(self, vector: Tensor) -> Tensor:
        """See `Ops`."""
        return vector + 1.0

    def embedding(self, token_ids: Tensor, weight: str) -> Tensor:
        """See `Ops`."""
        return functional.embedding(token_ids, self.weights.tensor(weight))

    def rows(self, x: Tensor, index: Tensor) -> Tensor:
        """See `Ops`."""
        return x[index]

    def concat(self, a: Tensor, b: Tensor) -> Tensor:
        """See `Ops`."""
        return torch.cat([a, b], dim=-1)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """See `Ops`."""
        return a + b

    def linear(self, x: Tensor, weight: str) -> Tensor:
        """See `Ops`."""
        return functional.linear(x, self.weights.tensor(weight))

    def linear_fp32(self, x: Tensor, weight: str) -> Tensor:
        """See `Ops`."""
        return functional.linear(x.float(), self.weights.tensor(weight).float())

    def bias(self, x: Tensor, vector: Tensor) -> Tensor:
        """See `Ops`."""
        return x + vector

    def sigmoid(self, x: Tensor) -> Tensor:
        """See `Ops`."""
        return torch.sigmoid(x)

    def swiglu(self, gate: Tensor, up: Tensor, limit: float) -> Tensor:
        """See `Ops`."""
        activated = functional.silu(gate)
        if limit:
            activated, up = activated.clamp(max=limit), up.clamp(-limit, limit)
        return activated * up

    def rms_norm(self, x: Tensor, gamma: Tensor, eps: float) -> Tensor:
        """See `Ops`."""
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * gamma).to(x.dtype)

    def gated_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor,
        q_gamma: Tensor,
        k_gamma: Tensor,
        eps: float,
        layer: LayerSpec,
    ) -> Tensor:
        """See `Ops`."""
        if self.kernels is not None:
            return self.kernels.gated_attention(self.batch, q, k, v, gate, q_gamma, k_gamma, eps, layer)
        d = layer.head_dim
        q = self.rms_norm(q.view(-1, layer.query_heads, d), q_gamma, eps)
        k = self.rms_norm(k.view(-1, layer.kv_heads, d), k_gamma, eps)
        v = v.view(-1, layer.kv_heads, d)
        frequencies = torch.from_numpy(inverse_frequencies(layer)).to(q.device)
        outputs, start = [], 0
        for length, past, cache in zip(self.batch.lengths, self.batch.pasts, self.batch.caches, strict=True):
            part = slice(start, start + length)
            positions = torch.arange(past, past + length, device=q.device)
            queries, keys, values = rotate(q[part], positions, frequencies), k[part], v[part]
            keys = rotate(keys, positions, frequencies)
            if cache is not None:
                keys, values = cache.setdefault(layer.index, LayerCache()).append(keys, values)
            outputs.append(attend(queries, keys, values, past, layer.window))
            start += length
        return (torch.cat(outputs) * torch.sigmoid(gate)[..., None]).flatten(-2)

    def sparse_moe(
        self,
        x: Tensor,
        selection: Tensor,
        weights: Tensor,
        experts: str,
        top_k: int,
        scale: float,
        limit: float,
    ) -> Tensor:
        """See `Ops`."""
        if self.kernels is not None:
            return self.kernels.sparse_moe(x, selection, weights, experts, top_k, scale, limit)
        chosen = selection.topk(top_k, dim=-1).indices
        mix = weights.gather(-1, chosen)
        mix = mix / (mix.sum(-1, keepdim=True) + 1e-20) * scale
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in sorted(set(chosen.flatten().tolist())):
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            gate, up, down = (
                self.weights.expert(f"{experts}.{part}.weight", expert)
                for part in ("gate_proj", "up_proj", "down_proj")
            )
            if gate is None or up is None or down is None:
                continue  # another rank adds what this expert contributes
            some = x[token]
            hidden = self.swiglu(functional.linear(some, gate), functional.linear(some, up), limit)
            out = out.index_add(0, token, functional.linear(hidden, down).float() * mix[token, slot, None])
        return out.to(x.dtype)


def rotate(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Half-split rotary embedding of the leading `2 * len(frequencies)` dimensions of `[t, heads, d]`."""
    half = len(frequencies)
    turn = positions.float()[:, None] * frequencies
    cos, sin = turn.cos().to(x.dtype)[:, None], turn.sin().to(x.dtype)[:, None]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, past: int, window: int) -> Tensor:
    """Causal attention of `[t, H, d]` queries at positions past.. over `[rows, G, d]`; softmax in fp32."""
    share = q.shape[1] // k.shape[1]
    distance = torch.arange(past, past + len(q))[:, None] - torch.arange(len(k))
    seen = distance >= 0
    if window:
        seen &= distance < window
    q, k, v = (
        x.transpose(0, 1)[None] for x in (q, k.repeat_interleave(share, 1), v.repeat_interleave(share, 1))
    )
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen.to(q.device))
    return out[0].transpose(0, 1)
