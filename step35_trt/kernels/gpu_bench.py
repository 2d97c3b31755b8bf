"""`tuning.Bench` on the GPU that is here."""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from step35_trt.errors import Step35Error
from step35_trt.kernels import plugin
from step35_trt.kernels.compile import compile_kernels
from step35_trt.kernels.report import report
from step35_trt.kernels.tactics import Tactics
from step35_trt.kernels.timing import seconds
from step35_trt.kernels.tuning import starting_point, tune
from step35_trt.kernels.workloads import published, workloads

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from step35_trt.config import Step35Config
    from step35_trt.kernels.targets import GpuTarget
    from step35_trt.kernels.tuning import Entries, Progress
    from step35_trt.kernels.workloads import Workload


def tuned(name: str, target: GpuTarget, device: torch.device, progress: Progress) -> Tactics:
    """Tactics of the plugin `name`, measured on `device`.

    Raises:
        UnsupportedError: there is nothing to start from.
    """
    scale = published()
    with torch.inference_mode():
        some = [made for make in workloads(scale, device) if (made := make()).plugin == name]
        found = tune(
            starting_point(name, target).entries, GpuBench(name, target, scale.config, some), progress
        )
    said = f"{torch.cuda.get_device_name(device)}, {datetime.datetime.now(datetime.UTC):%d %B %Y}"
    return Tactics(measured=said, entries=found)


@dataclass(frozen=True)
class GpuBench:
    """Workloads of one plugin on the present GPU.

    Attributes:
        plugin: Its name.
        target: What the GPU is.
        config: Whose kernels have to compile.
        workloads: What is timed.
    """

    plugin: str
    target: GpuTarget
    config: Step35Config
    workloads: Sequence[Workload]
    _definitions: dict[int, Tensor] = field(default_factory=dict)

    @property
    def problems(self) -> Sequence[Mapping[str, int]]:
        """See `Bench`."""
        return [workload.problem for workload in self.workloads]

    def compiles(self, entries: Entries, kernel: str) -> bool:
        """See `Bench`."""
        try:
            variants = plugin.load(self.plugin, "variants").variants(
                self.config, self.target.capability, Tactics(entries=entries)
            )
            made = compile_kernels([v for v in variants if v.function == kernel], self.target)
        except (Step35Error, ValueError):
            return False
        return not any(report(item).failures for item in made)

    def seconds(self, workload: int, entries: Entries) -> float:
        """See `Bench`. A failing launch is this candidate's; an error that the device keeps ends the run."""
        asked = self.workloads[workload]
        if workload not in self._definitions:
            self._definitions[workload] = asked.definition()
        want = self._definitions[workload]
        try:
            got = asked.run(entries)[: len(want)].float()
        except (Step35Error, ValueError):
            return math.inf
        if not (got - want).abs().max() <= asked.tolerance * want.abs().max():
            return math.inf
        return seconds(lambda: asked.run(entries))
