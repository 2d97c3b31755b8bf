"""TensorRT's own progress: told on, and a build ended where the user asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

    from step35_trt.interrupts import Stopped
    from step35_trt.progress import Progress


def monitor(trt: ModuleType, progress: Progress, stopped: Stopped) -> Any:
    """An `IProgressMonitor` that tells each phase's steps, and cancels where `stopped` says so.

    TensorRT may call it from several threads. An exception of `progress` cannot pass through TensorRT: the
    build is cancelled and the exception kept in `failure`.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined,misc] # TensorRT calls back a class of its own
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.failure: Exception | None = None
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                progress(step + 1, self._steps.get(phase_name, step + 1), phase_name)
            except Exception as failure:
                self.failure = failure
            return self.failure is None and not stopped()

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()
