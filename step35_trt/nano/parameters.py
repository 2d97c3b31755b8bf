"""nano's parameters while it is trained: the torch dialect's `Weights`, their start and their optimiser."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from step35_trt.checkpoint import expected_tensors
from step35_trt.dialects.torch import TorchOps

if TYPE_CHECKING:
    from pathlib import Path

    from step35_trt.config import Step35Config

EMBEDDING_SPREAD = 0.3
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the usual quintic: singular values to about 1 in five rounds


@dataclass(frozen=True)
class Parameters:
    """`Weights` over trainable fp32 tensors; router biases are among them but get no gradient."""

    values: dict[str, Tensor]
    _experts: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)

    @classmethod
    def start(cls, config: Step35Config, generator: torch.Generator) -> Parameters:
        """Random matrices, norms at one; what writes into the residual stream starts small."""
        values = {}
        for name, shape in expected_tensors(config).items():
            if len(shape) == 1:
                values[name] = torch.zeros(shape)
                continue
            spread = EMBEDDING_SPREAD if "embed_tokens" in name else 1 / math.sqrt(shape[-1])
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight", "output.weight")):
                spread *= 0.1
            values[name] = torch.randn(shape, generator=generator) * spread
        for name, value in values.items():
            value.requires_grad_(not name.endswith("router_bias"))
        return cls(values)

    def tensor(self, name: str) -> Tensor:
        """See `Weights`."""
        return self.values[name]

    def expert(self, name: str, index: int) -> Tensor:
        """See `Weights`."""
        if name not in self._experts:  # one backward for the stack instead of one for each expert
            self._experts[name] = self.values[name].unbind(0)
        return self._experts[name][index]

    def end_step(self) -> None:
        """Forget gradients and the views that belong to the step's graph."""
        self._experts.clear()
        for value in self.values.values():
            value.grad = None

    def round(self) -> None:
        """Round to what the file holds: bf16, router biases fp32."""
        with torch.no_grad():
            for name, value in self.values.items():
                value.copy_(value.to(stored_dtype(name)).float())
        self._experts.clear()

    def save(self, file: Path) -> None:
        """Write the published names and types."""
        tensors = {name: value.detach().to(stored_dtype(name)) for name, value in self.values.items()}
        save_file(tensors, file, metadata={"format": "pt"})


def stored_dtype(name: str) -> torch.dtype:
    """Type of a parameter in the checkpoint."""
    return torch.float32 if name.endswith("router_bias") else torch.bfloat16


@dataclass(frozen=True)
class CountingOps(TorchOps):
    """The torch dialect, noting how many tokens each expert gets."""

    loads: dict[str, Tensor] = field(default_factory=dict)

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
        chosen = selection.detach().topk(top_k, dim=-1).indices
        self.loads[experts] = torch.bincount(chosen.flatten(), minlength=selection.shape[-1])
        return super().sparse_moe(x, selection, weights, experts, top_k, scale, limit)


def balance(parameters: Parameters, loads: dict[str, Tensor], rate: float) -> None:
    """Raise the router bias of experts with too few tokens and lower the others': no auxiliary loss."""
    for experts, load in loads.items():
        mean = load.float().mean()
        parameters.values[f"{experts}.router_bias"].add_(torch.sign(mean - load), alpha=rate)


class Optimiser:
    """Orthogonalised momentum for the matrices inside the blocks, Adam for everything else."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        trained = {name: value for name, value in values.items() if value.requires_grad}
        outer = ("embed_tokens", "lm_head", "shared_head", "moe.gate")
        matrices = [v for n, v in trained.items() if v.ndim > 1 and not any(part in n for part in outer)]
        rest = [(n, v) for n, v in trained.items() if v.ndim == 1 or any(part in n for part in outer)]
        rates = {"embed_tokens": 0.01, "moe.gate": 0.002, "norm": 0.01}
        groups = [
            {"params": [v], "peak": next((rate for part, rate in rates.items() if part in n), 0.004)}
            for n, v in rest
        ]
        self._adam = torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-10)
        shapes = sorted({tuple(v.shape[-2:]) for v in matrices})
        self._groups = [[v for v in matrices if v.shape[-2:] == shape] for shape in shapes]
        self._momenta: list[Tensor | None] = [None] * len(shapes)

    @torch.no_grad()
    def step(self, fraction: float, rate: float = 0.02, momentum: float = 0.95) -> None:
        """One update at `fraction` of the peak rates."""
        for group in self._adam.param_groups:
            group["lr"] = group["peak"] * fraction
        self._adam.step()
        for index, matrices in enumerate(self._groups):
            gradient = torch.cat([_stack(v.grad if v.grad is not None else v * 0) for v in matrices])
            kept = self._momenta[index]
            kept = gradient if kept is None else torch.lerp(gradient, kept, momentum)
            self._momenta[index] = kept
            update = _orthogonal(torch.lerp(gradient, kept, momentum))
            update = update * (rate * fraction * max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5)
            start = 0
            for value in matrices:
                count = len(_stack(value))
                value.sub_(update[start : start + count].reshape(value.shape))
                start += count


def _stack(value: Tensor) -> Tensor:
    return value.reshape(-1, *value.shape[-2:])


def _orthogonal(matrices: Tensor) -> Tensor:
    """The nearest matrix with equal singular values, roughly, of each `[n, rows, columns]`."""
    a, b, c = NEWTON_SCHULZ
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x: Tensor = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.transpose(-2, -1)
