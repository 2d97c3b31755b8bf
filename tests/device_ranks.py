"""Sessions on devices that share a checkpoint, in fp32 as far as kernels are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from step35_trt.checkpoint import EXPERT_PROJECTIONS, Checkpoint
from step35_trt.dialects.torch_experts import Experts
from step35_trt.kernels import plugin
from step35_trt.lower import ModelPrograms
from step35_trt.runtime.cache.cache_extent import Extent
from step35_trt.runtime.programs.leading import follow
from step35_trt.runtime.programs.program_weights import checkpoint_share, tensor
from step35_trt.runtime.programs.ranks import Ranks
from step35_trt.runtime.session_cuda import device_runner, device_weights
from step35_trt.runtime.session_program import ProgramSession
from step35_trt.sharing import ALONE, Sharing
from tests.forms import forms

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from step35_trt.runtime.device.device_weights import Stored
    from step35_trt.runtime.device.recording import Recorder
    from step35_trt.sharing import Part, Way
    from step35_trt.weight_forms import Forms

EXTENT = Extent(slots=3, rows=400, call=48)
PARTS: dict[str, tuple[Part, ...]] = {
    "attention": ("attention",),
    "experts": ("routed experts",),
    "mlp": ("dense MLP", "shared expert"),
    "head": ("head",),
}


def sharing(ranks: int, ways: Mapping[str, Way]) -> Sharing:
    """As an engine's `parallelism` says it."""
    return Sharing(ranks, {part: way for name, way in ways.items() for part in PARTS[name]})


def session_of(
    path: Path, device: torch.device, record: Recorder | None = None, shared: Sharing = ALONE
) -> ProgramSession:
    """A rank's, without a bundle; a follower does not come back."""
    checkpoint = Checkpoint.open(path)
    whole = forms(checkpoint.config, "fp32")
    made = ModelPrograms.of(checkpoint.config, whole, shared)
    ranks = Ranks.join(device) if shared.ranks > 1 else None
    rank = ranks.rank if ranks else 0
    weights = device_weights(made, ShareSource(checkpoint, whole, shared, rank, device), device)
    config = shared.config(checkpoint.config)
    runner = device_runner(config, made, weights, EXTENT, torch.float32, record, ranks=ranks)
    if ranks and rank:
        follow(ranks, runner.obey)
    return ProgramSession(checkpoint.config, runner, EXTENT.rows, 16, EXTENT.slots)


@dataclass(frozen=True)
class ShareSource:
    """`WeightSource` of what a rank has of a checkpoint whose weights are not coded.

    Attributes:
        checkpoint: Of the whole model.
        forms: Likewise.
        sharing: Who holds what.
        rank: From 0.
        device: Where to.
    """

    checkpoint: Checkpoint
    forms: Forms
    sharing: Sharing
    rank: int
    device: torch.device

    def dense(self, name: str) -> Stored:
        """See `WeightSource`."""
        return self._values(name, None).to(self.device), None

    def experts(self, prefix: str) -> Experts:
        """See `WeightSource`; bf16, as kernels take them and checkpoints have them."""
        module, stacks = plugin.load("sparse_moe", "weights"), []
        for part in EXPERT_PROJECTIONS:
            name = f"{prefix}.{part}.weight"
            held = self.sharing.held(name, self.forms.shapes[name][0], self.rank)
            stack = torch.stack([self._values(name, expert) for expert in held])
            stacks.append(module.Matrix(stack.to(self.device, torch.bfloat16), None))
        return Experts("bf16", module.ExpertWeights(*stacks), held.start)

    def _values(self, name: str, expert: int | None) -> Tensor:
        packed = checkpoint_share(self.checkpoint, self.forms, self.sharing, self.rank)(name, expert)
        assert packed is not None
        assert packed.scales is None
        return tensor(np.array(packed.values))
