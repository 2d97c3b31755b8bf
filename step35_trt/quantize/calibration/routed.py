"""The routed experts of one layer, one at a time, each with the tokens that chose it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from step35_trt.dialects.torch import SequenceBatch, TorchOps
from step35_trt.quantize.calibration import awq
from step35_trt.quantize.calibration.matrices import Errors, settle
from step35_trt.quantize.calibration.observe import StreamedWeights
from step35_trt.quantize.calibration.quantised import QuantisedOps, QuantisedWeights
from step35_trt.quantize.calibration.report import Coverage, ScaleReport
from step35_trt.quantize.calibration.setup import stride
from step35_trt.quantize.calibration.sites import stacked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from step35_trt.config import LayerSpec
    from step35_trt.dialects.torch import Weights
    from step35_trt.quantize.calibration.matrices import MatrixPlan
    from step35_trt.quantize.calibration.observe import Routing
    from step35_trt.quantize.calibration.setup import Setup
    from step35_trt.quantize.calibration.sites import Stage


@dataclass(frozen=True)
class Experts:
    """A layer's experts and the tokens that reach them.

    Attributes:
        setup: The calibration.
        stage: The layer.
        routing: What the tokens chose.
        normed: `[n, D]`, the input of router and experts, mapped.
    """

    setup: Setup
    stage: Stage
    routing: Routing
    normed: Tensor

    @property
    def layer(self) -> LayerSpec:
        """The layer."""
        assert self.stage.layer is not None
        return self.stage.layer

    def coverage(self) -> Coverage:
        """How many tokens each expert got, and who falls back."""
        least = self.setup.min_expert_tokens
        tokens = self.routing.counts(self.setup.config.moe_num_experts)
        return Coverage(
            tokens=tuple(tokens), least=least, fallback=tuple(e for e, n in enumerate(tokens) if n < least)
        )

    def run(self, weights: Weights, out: Tensor) -> None:
        """Add every expert's output to `out [n, D]`, as the dialect's `sparse_moe` does in one call."""
        names = stacked(self.layer)
        for expert in range(self.setup.config.moe_num_experts):
            token, mix = self.routing.of(expert)
            if len(token):
                gate, up, down = (
                    _Matrix(weights, name, expert, self.setup.fp8_activations) for name in names
                )
                x = self.normed[token].to(self.setup.device)
                hidden = self._hidden(gate(x), up(x))
                out.index_add_(0, token, down(hidden).cpu() * mix)

    def products(self, name: str, most: int) -> Iterator[awq.Product]:
        """A stacked gate or up of at most `most` experts, spread over the loads of those that are covered."""
        counts = np.array(self.routing.counts(self.setup.config.moe_num_experts))
        covered = np.flatnonzero(counts >= max(1, self.setup.min_expert_tokens))
        order = covered[np.argsort(counts[covered], kind="stable")]
        if len(order) > most:
            order = order[np.linspace(0, len(order) - 1, most).round().astype(int)]
        weights = StreamedWeights(self.setup.source, self.setup.device)
        for expert in order.tolist():
            yield awq.Product(
                name, weights.expert(name, expert), self.setup.coding_of(name), self._inputs(expert)
            )

    def calibrate(
        self,
        plans: dict[str, MatrixPlan],
        out: Tensor,
        scales: list[ScaleReport],
        advance: Callable[[int], None],
    ) -> dict[str, Errors]:
        """Read each expert once: add its output to `out`, choose its scale and clips, measure its errors.

        Args:
            plans: Of the three stacked matrices, with the scale that gate and up share; completed.
            out: `[n, D]`, the stage's output, so far without experts.
            scales: Added to.
            advance: Called with the weights that are done.
        """
        names = stacked(self.layer)
        gate_name, up_name, down_name = names
        count, width = self.setup.config.moe_num_experts, self.setup.config.moe_intermediate_size
        totals = {name: Errors() for name in names}
        single: dict[str, list[float]] = {name: [] for name in names}
        clips: dict[str, list[Tensor]] = {name: [] for name in names}
        fallback = set(self.coverage().fallback)
        own = self.setup.search and plans[down_name].coding.kind == "int4" and not self.layer.routed_limit
        if own:
            plans[up_name].rows, plans[down_name].columns = torch.ones(count, width), torch.ones(count, width)
        reader = StreamedWeights(self.setup.source, self.setup.device)
        for expert in range(count):
            weights = {name: reader.expert(name, expert) for name in names}
            token, mix = self.routing.of(expert)
            x = self.normed[token].to(self.setup.device)
            hidden = self._hidden(
                functional.linear(x, weights[gate_name]), functional.linear(x, weights[up_name])
            )
            out.index_add_(0, token, functional.linear(hidden, weights[down_name]).cpu() * mix)
            step = stride(len(token))
            if own and expert not in fallback and len(token):
                choice = self._search(down_name, weights[down_name], hidden, hidden[::step])
                scales.append(
                    ScaleReport(
                        consumers=(down_name,),
                        expert=expert,
                        alpha=choice.alpha,
                        error=choice.error,
                        unscaled=choice.unscaled,
                    )
                )
                columns, rows = plans[down_name].columns, plans[up_name].rows
                assert columns is not None
                assert rows is not None
                columns[expert], rows[expert] = choice.scale.cpu(), (1 / choice.scale).cpu()
            for name in names:
                inputs = hidden if name == down_name else x
                square = None if expert in fallback or not len(inputs) else inputs.square().mean(0)
                errors = Errors()
                clip = settle(
                    weights[name],
                    plans[name].expert(expert).to(self.setup.device),
                    errors,
                    inputs[::step],
                    square,
                    self.setup.search,
                )
                if clip is not None:
                    clips[name].append(clip.cpu())
                totals[name].add(errors)
                single[name].append(errors.relative_weight)
                advance(weights[name].numel())
        for name in names:
            plans[name].expert_errors = tuple(single[name])
            plans[name].clip = torch.stack(clips[name]) if clips[name] else None
        return totals

    def _search(self, name: str, weight: Tensor, hidden: Tensor, sample: Tensor) -> awq.Choice:
        product = awq.Product(name, weight, self.setup.coding_of(name), sample)
        profile = awq.weight_profile([product])
        return awq.search(lambda: [product], hidden.abs().mean(0), profile, torch.clone, awq.ALPHAS[::2])

    def _inputs(self, expert: int) -> Tensor:
        token, _ = self.routing.of(expert)
        return self.normed[token[:: stride(len(token))]].to(self.setup.device)

    def _hidden(self, gate: Tensor, up: Tensor) -> Tensor:
        ops = TorchOps(StreamedWeights(self.setup.source, self.setup.device), SequenceBatch.fresh())
        return ops.swiglu(gate, up, self.layer.routed_limit)


@dataclass(frozen=True)
class _Matrix:
    """One expert's product, its input rounded where the quantised product rounds it."""

    weights: Weights
    name: str
    expert: int
    fp8: bool

    def __call__(self, x: Tensor) -> Tensor:
        if isinstance(self.weights, QuantisedWeights):
            x = QuantisedOps(self.weights, SequenceBatch.fresh(), fp8=self.fp8).rounded(x, self.name)
        return functional.linear(x, self.weights.expert(self.name, self.expert))
