"""One stage through calibration: watch it, choose scales and clips, quantise it, compare."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from step35_trt.quantize.calibration import awq
from step35_trt.quantize.calibration.matrices import Errors, MatrixPlan, settle
from step35_trt.quantize.calibration.observe import Inputs, Routing, StreamedWeights, WatchingOps
from step35_trt.quantize.calibration.passage import run_stage
from step35_trt.quantize.calibration.quantised import QuantisedOps, QuantisedWeights
from step35_trt.quantize.calibration.report import RoutingReport, ScaleReport, StageReport
from step35_trt.quantize.calibration.routed import Experts
from step35_trt.quantize.calibration.setup import SEARCHED_EXPERTS, stride
from step35_trt.quantize.calibration.sites import stacked
from step35_trt.quantize.folding import Folded, Folding, Scaling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from step35_trt.dialects.torch import SequenceBatch, Weights
    from step35_trt.quantize.calibration.setup import Setup
    from step35_trt.quantize.calibration.sites import Site, Stage


@torch.inference_mode()
def calibrate_stage(setup: Setup, stage: Stage, tick: Callable[[int], None]) -> tuple[Folding, StageReport]:
    """Run one stage; its outputs become the next stage's hidden states.

    Args:
        setup: The calibration.
        stage: Which one.
        tick: Called with the bytes of weights that are finished within the stage.
    """
    return _Run(setup, stage, tick).run()


@dataclass
class _Run:
    setup: Setup
    stage: Stage
    tick: Callable[[int], None]
    plans: dict[str, MatrixPlan] = field(default_factory=dict)
    scales: list[ScaleReport] = field(default_factory=list)
    done: int = 0

    def run(self) -> tuple[Folding, StageReport]:
        setup, stage = self.setup, self.stage
        self.plans = {name: MatrixPlan(name, setup.coding_of(name)) for name in stage.matrices}
        with ExitStack() as stack:
            out = normed = None
            if stage.kind != "head":
                out = stack.enter_context(setup.spool.writing(stage.reads + 1))
            if stage.moe:
                normed = stack.enter_context(setup.spool.scratch("routed"))
            step = stride(setup.token_ids.numel())
            watched = {site.consumers[0]: Inputs(step) for site in stage.sites if not self._routed(site)}
            weights = StreamedWeights(setup.source, setup.device)
            routing = self._forward(weights, out, normed, watched, WatchingOps)
            experts = Experts(setup, stage, routing, normed) if routing and normed is not None else None
            norms: dict[str, Scaling] = {}
            if setup.search:
                for site in stage.sites:
                    norms |= self._search(site, watched, experts)
            inputs = {
                name: watched[site.consumers[0]]
                for site in stage.sites
                for name in site.consumers
                if not self._routed(site)
            }
            errors = {name: self._settle(name, inputs.get(name)) for name in self._dense()}
            if experts and out is not None:
                errors |= experts.calibrate(self.plans, out, self.scales, self._advance)
            folding = Folding({**norms, **{n: s for n, p in self.plans.items() if (s := p.scaling())}})
            report = StageReport(
                name=stage.name,
                output_error=None,
                matrices=tuple(
                    self.plans[name].report(errors[name], setup.source) for name in stage.matrices
                ),
                scales=tuple(self.scales),
                coverage=experts.coverage() if experts else None,
            )
            if out is not None and stage.kind != "embedding":
                error, flips = self._compare(folding, out, routing, stack)
                report = report.model_copy(update={"output_error": error, "routing": flips})
        return folding, report

    def _forward(
        self,
        weights: Weights,
        out: Tensor | None,
        normed: Tensor | None,
        watched: dict[str, Inputs],
        kind: Callable[..., WatchingOps],
    ) -> Routing | None:
        """All sequences through the stage, without routed experts; fills `out` and `normed`."""
        routings: list[Routing] = []

        def ops(batch: SequenceBatch, first: int) -> WatchingOps:
            return kind(
                weights=weights,
                batch=batch,
                watched=watched,
                routings=routings,
                routed=normed,
                first=first,
            )

        run_stage(self.setup, self.stage, ops, out)
        return Routing.joined(routings) if routings else None

    def _search(self, site: Site, watched: dict[str, Inputs], experts: Experts | None) -> dict[str, Scaling]:
        """Find the scale of one input, note it in the plans; returns what the norms take."""
        if self._routed(site) or not (site.norms or site.rows):
            return {}
        coded = [name for name in site.consumers if self.plans[name].coding.kind == "int4"]
        if not coded:
            return {}
        seen = watched[site.consumers[0]]

        def products() -> Iterator[awq.Product]:
            for name in coded:
                if experts and name in stacked(experts.layer):
                    yield from experts.products(name, SEARCHED_EXPERTS)
                else:
                    yield from self._products(name, seen.sample)

        device = self.setup.device
        mean, profile = seen.mean_abs, awq.weight_profile(products())
        if site.rows:
            mean = awq.mean_over_heads(mean, site.share, site.head) if site.head else mean
            profile = awq.mean_over_heads(profile, site.share, site.head) if site.head else profile
            absorb = awq.shared_by_heads(site.share, site.head) if site.head else torch.clone
        else:
            stored = np.concatenate([self.setup.source.read(name) for name in site.norms])
            absorb = awq.absorbed_by_norm(torch.from_numpy(stored).to(device))
        choice = awq.search(products, mean, profile, absorb)
        self.scales.append(
            ScaleReport(
                consumers=site.consumers, alpha=choice.alpha, error=choice.error, unscaled=choice.unscaled
            )
        )
        if choice.alpha is None:
            return {}
        for name in site.consumers:
            self.plans[name].columns = choice.scale.cpu()
        inverse = (1 / choice.scale).cpu()
        if site.rows:
            # One of each group's heads stands for all: they have the same scale.
            own = inverse.view(-1, site.share, site.head)[:, 0].flatten() if site.head else inverse
            self.plans[site.rows].rows = own
            return {}
        halves = inverse.chunk(len(site.norms))
        return {
            name: Scaling(rows=half.clone().numpy()) for name, half in zip(site.norms, halves, strict=True)
        }

    def _products(self, name: str, sample: Tensor) -> Iterator[awq.Product]:
        n, k = self.setup.source.shape(name)
        for rows in awq.slices(n, k):
            weight = torch.from_numpy(self.setup.source.read(name, rows)).to(self.setup.device)
            yield awq.Product(name, weight, self.plans[name].coding, sample)

    def _settle(self, name: str, inputs: Inputs | None) -> Errors:
        """Choose a dense matrix's clips and measure its errors, some rows at a time."""
        plan, source = self.plans[name], self.setup.source
        n, k = source.shape(name)
        total, clips = Errors(), []
        for rows in awq.slices(n, k):
            weight = torch.from_numpy(source.read(name, rows)).to(self.setup.device)
            clip = settle(
                weight,
                plan.part(rows).to(weight.device),
                total,
                inputs.sample if inputs else None,
                inputs.mean_square if inputs else None,
                self.setup.search,
            )
            if clip is not None:
                clips.append(clip.cpu())
            self._advance(weight.numel())
        if clips:
            plan.clip = torch.cat(clips)
        return total

    def _compare(
        self, folding: Folding, out: Tensor, routing: Routing | None, stack: ExitStack
    ) -> tuple[float, RoutingReport | None]:
        """The quantised stage on the same states: its error beside what the stage adds, and its choices."""
        setup, stage = self.setup, self.stage
        other = stack.enter_context(setup.spool.scratch("quantised"))
        weights = QuantisedWeights(Folded(setup.source, folding), folding, setup.coding, setup.device)
        normed = stack.enter_context(setup.spool.scratch("routed-again")) if routing else None
        again = self._forward(weights, other, normed, {}, partial(QuantisedOps, fp8=setup.fp8_activations))
        flips = None
        if routing and again and normed is not None:
            Experts(setup, stage, again, normed).run(weights, other)
            differ, beyond = routing.flips(again)
            flips = RoutingReport(tokens=len(routing.chosen), flips=differ, beyond_rounding=beyond)
        states = setup.spool.read(stage.reads)
        error = size = 0.0
        for first in range(0, len(out), setup.chunk):
            part = slice(first, first + setup.chunk)
            error += float((other[part] - out[part]).square().sum())
            added = out[part] if stage.kind == "mtp" else out[part] - states[part]
            size += float(added.square().sum())
        return math.sqrt(error / size) if size else 0.0, flips

    def _dense(self) -> Iterator[str]:
        layer = self.stage.layer
        return (name for name in self.stage.matrices if not (layer and name in stacked(layer)))

    def _routed(self, site: Site) -> bool:
        """Whether all of a site's matrices are stacked: their inputs are known one expert at a time."""
        return self.stage.layer is not None and site.consumers[0] in stacked(self.stage.layer)

    def _advance(self, values: int) -> None:
        self.done += values
        self.tick(self.done)
