"""What must hold of a kernel's results whatever its speed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from step35_trt.kernels.tactics import Tactic
    from step35_trt.kernels.workloads import Workload


@dataclass(frozen=True)
class Check:
    """Of one workload.

    Attributes:
        error: Largest difference from the definition over the definition's largest magnitude.
        tolerance: The most that `error` may be.
        repeats: A second run gives the same bits.
        independent: So do a row's neighbours taken away.
    """

    error: float
    tolerance: float
    repeats: bool
    independent: bool

    @property
    def passed(self) -> bool:
        """Whether all holds; an error that is no number fails."""
        return self.error <= self.tolerance and self.repeats and self.independent


def check(workload: Workload, entries: Sequence[Tactic]) -> Check:
    """Run `workload` with the tactics `entries` and hold it against its definition."""
    first, second = workload.run(entries).clone(), workload.run(entries)
    want = workload.definition()
    error = (first[: len(want)].float() - want).abs().max() / want.abs().max()
    together, single = workload.alone(entries)
    return Check(
        error.item(),
        workload.tolerance,
        bool((first == second).all()),
        bool((together == single).all()),
    )
