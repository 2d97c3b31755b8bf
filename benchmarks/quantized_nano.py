"""What quantising costs nano: perplexity and drafting on held-out text, for every way of quantising it.

Three measures of each: the torch dialect over weights that are rounded while they are read (activations as
well where the recipe rounds them), the torch dialect over the checkpoint that `quantize` writes, and the CPU
engine built from that checkpoint. The bounds are those the project holds itself to.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from step35_trt.build import build
from step35_trt.checkpoint import Checkpoint
from step35_trt.dialects.checkpoint_weights import CheckpointWeights
from step35_trt.dialects.torch import TorchOps
from step35_trt.engine import EngineSpec
from step35_trt.evaluate import evaluate, log_softmax
from step35_trt.nano.corpus import held_out_text
from step35_trt.quantize.calibration import calibrate, calibration_tokens
from step35_trt.quantize.calibration.quantised import QuantisedWeights
from step35_trt.quantize.calibration.quantisers import quantise_activations
from step35_trt.quantize.convert import conversion_key, convert
from step35_trt.quantize.folding import Folded, Folding
from step35_trt.quantize.recipe import Recipe
from step35_trt.resources import NANO
from step35_trt.runtime.dialogue.text import Text
from step35_trt.runtime.load import open_bundle
from step35_trt.runtime.session_torch import TorchSession

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from step35_trt.dialects.torch import Weights
    from step35_trt.runtime.packing import Packed
    from step35_trt.runtime.session import Call, Session

LENGTH = 512
MODULES = 3
RUNS: tuple[tuple[str, Literal["none", "awq"]], ...] = (
    ("fp8", "none"),
    ("int4-awq", "none"),
    ("int4-awq", "awq"),
)
ENGINE = "cpu-int4"


@dataclass
class Figures:
    """Over held-out text.

    `acceptance[k]` is the share of rows where module k says what the decoder says, among those where the
    modules before it did.
    """

    perplexity: float
    acceptance: list[float]

    @property
    def accepted_length(self) -> float:
        """Mean tokens a step when all modules draft."""
        return 1 + float(np.cumprod(self.acceptance).sum())


def measure(session: Session, rows: Sequence[np.ndarray]) -> Figures:
    """Teacher-forced, every row a sequence of its own."""
    losses, matches = [], []
    for row in rows:
        said = evaluate(session, row)
        losses.append(-log_softmax(said.logits[:-1])[np.arange(len(row) - 1), row[1:]])
        own, last = said.logits.argmax(-1), len(row) - MODULES
        matches.append([said.mtp_logits[k, :last].argmax(-1) == own[1 + k :][:last] for k in range(MODULES)])
    together = np.concatenate(matches, axis=1).cumprod(0).sum(1)
    before = [sum(len(m[0]) for m in matches), *together[:-1]]
    return Figures(math.exp(np.concatenate(losses).mean()), (together / np.maximum(before, 1)).tolist())


@dataclass
class Kept:
    """`Weights` that are quantised once."""

    inner: QuantisedWeights
    _kept: dict[tuple[str, int | None], Tensor] = field(default_factory=dict)

    def tensor(self, name: str) -> Tensor:
        """See `Weights`."""
        if (name, None) not in self._kept:
            self._kept[name, None] = self.inner.tensor(name)
        return self._kept[name, None]

    def expert(self, name: str, index: int) -> Tensor:
        """See `Weights`."""
        if (name, index) not in self._kept:
            self._kept[name, index] = self.inner.expert(name, index)
        return self._kept[name, index]


@dataclass(frozen=True)
class RoundingOps(TorchOps):
    """The torch dialect with the inputs of FP8 products in FP8."""

    recipe: Recipe | None = None

    def _rounded(self, x: Tensor, weight: str) -> Tensor:
        assert self.recipe is not None
        fp8 = self.recipe.activations == "fp8" and self.recipe.rule(weight).precision.startswith("fp8")
        return quantise_activations(x) if fp8 else x

    def linear(self, x: Tensor, weight: str) -> Tensor:
        """See `Ops`."""
        return super().linear(self._rounded(x, weight), weight)

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
        x = self._rounded(x, f"{experts}.gate_proj.weight")
        return super().sparse_moe(x, selection, weights, experts, top_k, scale, limit)

    def swiglu(self, gate: Tensor, up: Tensor, limit: float) -> Tensor:
        """See `Ops`."""
        # Rounding again, which `linear` does for dense layers, changes nothing: the scale is the same.
        return self._rounded(super().swiglu(gate, up, limit), "model.layers.3.moe.down_proj.weight")


@dataclass(frozen=True)
class RoundingSession(TorchSession):
    """A session that rounds as a recipe's products do."""

    recipe: Recipe | None = None

    def _packed(self, calls: Sequence[Call], pasts: list[int]) -> tuple[Packed, TorchOps]:
        packed, ops = super()._packed(calls, pasts)
        return packed, RoundingOps(ops.weights, ops.batch, recipe=self.recipe)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16384, help="of calibration")
    parser.add_argument("--every", type=int, default=4, help="measure one in so many sequences of 512")
    parser.add_argument("--recipe", help="only this one")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    source, text = Checkpoint.open(NANO), Text.load(NANO)
    ids = np.array(text.encode(held_out_text()))
    rows = list(ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)[:: options.every])
    calibration = calibration_tokens(text, None, options.tokens)
    found = {"bf16": measure(TorchSession.of(source), rows)}
    _print("bf16", found["bf16"], found["bf16"], options.json)
    with tempfile.TemporaryDirectory() as directory:
        for recipe_name, method in RUNS:
            if options.recipe not in (None, recipe_name):
                continue
            recipe = Recipe.load(recipe_name)
            folder = Path(directory) / f"{recipe_name}-{method}"
            folding = Folding()
            if method != "none":
                folding = calibrate(source, recipe, calibration, folder / "work", method=method).folding
            rounded = QuantisedWeights(Folded(source, folding), folding, recipe.coding, torch.device("cpu"))
            weights: Weights = Kept(rounded)
            name = f"{recipe_name} {'to nearest' if method == 'none' else method}"
            session = RoundingSession(source.config, weights, recipe=recipe)
            found[name] = measure(session, rows)
            _print(name, found[name], found["bf16"], options.json)
            out = folder / "checkpoint"
            convert(source, out, recipe, conversion_key(source, recipe), folding)
            converted = Checkpoint.open(out)
            written = TorchSession(converted.config, CheckpointWeights(converted))
            found[f"{name}, written"] = measure(written, rows)
            _print(f"{name}, written", found[f"{name}, written"], found["bf16"], options.json)
            if recipe_name == "int4-awq":
                build(out, folder / "bundle", EngineSpec.load(ENGINE))
                found[f"{name}, {ENGINE}"] = measure(open_bundle(folder / "bundle"), rows)
                _print(f"{name}, {ENGINE}", found[f"{name}, {ENGINE}"], found["bf16"], options.json)
    if options.json:
        figures = {
            name: {"perplexity": f.perplexity, "acceptance": f.acceptance, "length": f.accepted_length}
            for name, f in found.items()
        }
        print(json.dumps(figures))
        return
    _verdict(found)


def _verdict(found: dict[str, Figures]) -> None:
    base = found["bf16"]
    claims = {
        "acceptance of each module within 10 %": all(
            a >= 0.9 * b for f in found.values() for a, b in zip(f.acceptance, base.acceptance, strict=True)
        )
    }
    for name, figures in found.items():
        if name.startswith("fp8"):
            claims[f"{name}: within 1 % of bf16"] = figures.perplexity <= 1.01 * base.perplexity
        if name.startswith("int4-awq awq"):
            nearest = found[name.replace("awq awq", "awq to nearest")]
            claims[f"{name}: within 3 % of bf16"] = figures.perplexity <= 1.03 * base.perplexity
            claims[f"{name}: better than to nearest"] = figures.perplexity < nearest.perplexity
    for claim, holds in claims.items():
        print(f"{claim}: {'yes' if holds else 'NO'}")


def _print(name: str, figures: Figures, base: Figures, quiet: bool) -> None:
    if not quiet:
        change = figures.perplexity / base.perplexity - 1
        shares = " ".join(f"{a:.4f}" for a in figures.acceptance)
        print(
            f"{name:>28}: perplexity {figures.perplexity:.4f} ({change:+.2%}), acceptance {shares}, "
            f"{figures.accepted_length:.3f} tokens a step",
            flush=True,
        )


if __name__ == "__main__":
    main()
