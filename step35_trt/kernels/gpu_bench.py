"""`tuning.Bench` on the GPU that is here."""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from triton.errors import TritonError

from step35_trt.errors import Step35Error
from step35_trt.kernels import plugin, tactics
from step35_trt.kernels.compile import compile_kernels
from step35_trt.kernels.report import report
from step35_trt.kernels.tactics import Tactics
from step35_trt.kernels.timing import seconds
from step35_trt.kernels.tuning import tune
from step35_trt.kernels.workloads import published, workloads

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from step35_trt.config import Step35Config
    from step35_trt.kernels.targets import GpuTarget
    from step35_trt.kernels.tuning import Entries
    from step35_trt.kernels.workloads import Workload
    from step35_trt.progress import Progress


def tuned(
    name: str,
    target: GpuTarget,
    device: torch.device,
    progress: Progress,
    keep: Callable[[Tactics], None],
) -> Tactics:
    """Tactics of the plugin `name`, measured on `device`.

    `keep` is given each improvement, as unfinished tactics: an interrupted search, or one that a kernel's
    error on the device ends, has lost nothing.

    Raises:
        UnsupportedError: there is nothing to start from.
    """
    scale = published()
    said = f"{torch.cuda.get_device_name(device)}, {datetime.datetime.now(datetime.UTC):%d %B %Y}"
    with torch.inference_mode():
        some = [make() for make in workloads(scale, device, (name,))]
        bench = GpuBench(name, target, scale.config, some)
        found = tune(
            tactics.load(name, target.capability).entries,
            bench,
            progress,
            lambda entries: keep(Tactics(measured=f"{said}, unfinished", entries=entries)),
        )
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
        """See `Bench`. What does not start is this candidate's; an error the device keeps ends the run."""
        asked = self.workloads[workload]
        if workload not in self._definitions:
            self._definitions[workload] = asked.definition()
        want = self._definitions[workload]
        try:
            got = asked.run(entries)[: len(want)].float()
            if not (got - want).abs().max() <= asked.tolerance * want.abs().max():
                return math.inf
            return seconds(lambda: asked.run(entries))
        except (Step35Error, ValueError, TritonError, torch.cuda.OutOfMemoryError):
            return math.inf
