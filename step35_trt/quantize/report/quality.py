"""KL and perplexity of a written checkpoint against the original, one matrix in memory at a time.

Both models read the same text, stage by stage; hidden states lie on disk in between. An interrupted
evaluation goes on at the stage where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from step35_trt import model
from step35_trt.dialects.torch import SequenceBatch, TorchOps
from step35_trt.journal import replacing
from step35_trt.quantize.calibration.awq import slices
from step35_trt.quantize.calibration.calibrate import locked
from step35_trt.quantize.calibration.observe import StreamedWeights
from step35_trt.quantize.calibration.passage import run_stage
from step35_trt.quantize.calibration.setup import Setup, chunk_tokens
from step35_trt.quantize.calibration.sites import stages
from step35_trt.quantize.calibration.spool import Spool
from step35_trt.quantize.report.data import Agreement, Quality
from step35_trt.quantize.report.replay import ReplayOps, Rounding
from step35_trt.quantize.report.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from step35_trt.checkpoint import Checkpoint
    from step35_trt.quantize.calibration.sites import Stage
    from step35_trt.quantize.report.held_out import HeldOut

ROWS = 1024  # whose logits are compared at a time
DRIFT = "drift.json"


@torch.inference_mode()
def measure_quality(
    before: Checkpoint,
    after: Checkpoint,
    held: HeldOut,
    work: Path,
    *,
    fp8_activations: bool,
    max_host_memory: int | None = None,
    tick: Callable[[str], None],
) -> Quality:
    """Run both models.

    Args:
        before: The original.
        after: Its conversion.
        held: The text.
        work: A directory for hidden states; made where it is not.
        fp8_activations: Whether products with FP8 weights round their inputs.
        max_host_memory: Bytes of address space the process may use.
        tick: Called with each stage that is done.

    Raises:
        DoesNotFitError: not enough memory for one sequence, or no room in `work`.
        UsageError: `work` cannot be written, or another process is using it.
    """
    parts = [before.identity(), after.identity(), held.digest, fp8_activations]
    key = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
    with locked(work):
        folder = work / key
        for old in work.iterdir():
            if old != folder:
                shutil.rmtree(old)
        pair = tuple(
            _Side.of(checkpoint, held, folder / name, fp8, max_host_memory)
            for checkpoint, name, fp8 in ((before, "before", False), (after, "after", fp8_activations))
        )
        drift: dict[str, float] = {}
        if (folder / DRIFT).exists():
            drift = json.loads((folder / DRIFT).read_text(encoding="utf-8"))
        last = before.config.num_hidden_layers
        for stage in stages(before.config):
            if stage.kind == "head":
                continue
            if stage.name not in drift:
                for side in pair:
                    side.forward(stage)
                drift[stage.name] = _distance(*(side.setup.spool.read(stage.reads + 1) for side in pair))
                with replacing(folder / DRIFT) as stream:
                    stream.write(json.dumps(drift).encode())
            for side in pair:
                if stage.reads < last:
                    side.setup.spool.drop(stage.reads)
            tick(stage.name)
        agreements = _agreements(*pair)
        return Quality(
            text=held.name,
            sequences=held.token_ids.shape[0],
            length=held.token_ids.shape[1],
            in_calibration=held.in_calibration,
            drift=drift,
            agreements=agreements,
        )


@dataclass(frozen=True)
class _Side:
    """One of the two models."""

    setup: Setup
    rounding: Rounding

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, held: HeldOut, folder: Path, fp8: bool, max_host_memory: int | None
    ) -> _Side:
        folder.mkdir(parents=True, exist_ok=True)
        config, ids = checkpoint.config, held.token_ids
        sequences, length = ids.shape
        setup = Setup(
            source=checkpoint,
            coding=lambda name, _shape: checkpoint.codings[name],
            token_ids=torch.from_numpy(ids),
            spool=Spool(folder, ids.size, config.hidden_size),
            device=torch.device("cpu"),
            search=False,
            fp8_activations=fp8,
            min_expert_tokens=0,
            chunk=chunk_tokens(config, sequences, length, max_host_memory),
        )
        return cls(setup, Rounding(checkpoint, fp8))

    @property
    def weights(self) -> StreamedWeights:
        return StreamedWeights(self.setup.source, self.setup.device)

    def forward(self, stage: Stage) -> None:
        """States of the next stage."""

        def ops(batch: SequenceBatch, first: int) -> ReplayOps:
            return ReplayOps(self.weights, batch, first=first, rounding=self.rounding)

        with self.setup.spool.writing(stage.reads + 1) as out:
            run_stage(self.setup, stage, ops, out)

    def head_input(self, index: int, norm: str, head: str) -> Tensor:
        """What the head of the decoder (0) or a module multiplies, for rows whose next token is known."""
        config = self.setup.config
        states = self.setup.spool.read(config.num_hidden_layers + index)
        count, length = self.setup.token_ids.shape
        scored = states.view(count, length, -1)[:, : length - 1 - index].flatten(0, 1)
        ops = TorchOps(self.weights, SequenceBatch.fresh())
        return self.rounding(model.norm(ops, scored, norm, config.rms_norm_eps), head)


def _agreements(before: _Side, after: _Side) -> tuple[Agreement, ...]:
    config, ids = before.setup.config, before.setup.token_ids
    heads = [("decoder", "model.norm.weight", "lm_head.weight")]
    for module, layer in enumerate(config.mtp_layers):
        own = f"{layer.prefix}.transformer.shared_head"
        heads.append((f"mtp-{module}", f"{own}.norm.weight", f"{own}.output.weight"))
    found: list[Agreement] = []
    said: Tensor | None = None  # by each model's decoder, [2, sequences, rows]
    for index, (part, norm, head) in enumerate(heads):
        tally = Tally.of(ids[:, 1 + index :].flatten())
        inputs = [side.head_input(index, norm, head) for side in (before, after)]
        for columns in slices(*before.setup.source.shape(head)):
            weights = [
                torch.from_numpy(side.setup.source.read(head, columns)).to(side.setup.device)
                for side in (before, after)
            ]
            for first in range(0, len(tally.targets), ROWS):
                rows = slice(first, first + ROWS)
                logits = [(x[rows] @ w.T).cpu() for x, w in zip(inputs, weights, strict=True)]
                tally.add(rows, columns.start, *logits)
        top = tally.top.view(2, len(ids), -1)
        said = top if said is None else said
        perplexity = tally.loss.mean(-1).exp().tolist()
        accepted = (None, None)
        if index:  # a module drafts what the decoder says `index` rows later
            accepted = tuple((top == said[..., index:]).double().mean((1, 2)).tolist())
        found.append(
            Agreement(
                part=part,
                tokens=len(tally.targets),
                mean_kl=max(0.0, float(tally.kl.mean())),
                max_kl=max(0.0, float(tally.kl.max())),
                same_top=float((top[0] == top[1]).double().mean()),
                perplexity_before=perplexity[0],
                perplexity_after=perplexity[1],
                accepted_before=accepted[0],
                accepted_after=accepted[1],
            )
        )
    return tuple(found)


def _distance(before: Tensor, after: Tensor) -> float:
    """`|after - before| / |before|`."""
    error = size = 0.0
    for first in range(0, len(before), ROWS):
        rows = slice(first, first + ROWS)
        error += float((after[rows] - before[rows]).square().sum(dtype=torch.float64))
        size += float(before[rows].square().sum(dtype=torch.float64))
    return math.sqrt(error / size) if size else 0.0
