"""Hidden states through one stage, some sequences at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from step35_trt import model
from step35_trt.dialects.torch import SequenceBatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from step35_trt.quantize.calibration.observe import WatchingOps
    from step35_trt.quantize.calibration.setup import Setup
    from step35_trt.quantize.calibration.sites import Stage


def run_stage(
    setup: Setup, stage: Stage, ops_of: Callable[[SequenceBatch, int], WatchingOps], out: Tensor | None
) -> None:
    """Run all sequences through a stage.

    Args:
        setup: Token ids, the states that the stage reads, and how many tokens may pass at a time.
        stage: Which one.
        ops_of: The dialect for some sequences, given the number of their first token among the stage's.
        out: `[tokens, D]`, filled; rows of a sequence that a module does not have stay. None: kept nowhere.
    """
    config = setup.config
    count, length = setup.token_ids.shape
    rows = length - 1 - stage.module if stage.kind == "mtp" else length
    states = None if stage.kind == "embedding" else setup.spool.read(stage.reads).view(count, length, -1)
    for first in range(0, count, step := max(1, setup.chunk // length)):
        part = slice(first, min(count, first + step))
        ids = setup.token_ids[part]
        ops = ops_of(SequenceBatch.fresh(*(rows,) * len(ids)), first * rows)
        if states is None:
            y = ops.embedding(ids.flatten(), "model.embed_tokens.weight")
        else:
            x = states[part, :rows].flatten(0, 1).to(setup.device)
            y = _compute(ops, setup, stage, x, ids[:, 1 + stage.module :].flatten())
        if out is not None:
            out.view(count, length, -1)[part, :rows] = y.view(len(ids), rows, config.hidden_size).cpu()


def _compute(ops: WatchingOps, setup: Setup, stage: Stage, x: Tensor, ids: Tensor) -> Tensor:
    config = setup.config
    if stage.kind == "head":
        return model.head(ops, config, x, "model.norm.weight", "lm_head.weight")
    assert stage.layer is not None
    if stage.kind == "layer":
        return model.block(ops, config, stage.layer, x)
    ids = ids.to(x.device)
    return model.mtp_module(ops, config, stage.module, ids, x, torch.arange(len(x), device=x.device))[1]
