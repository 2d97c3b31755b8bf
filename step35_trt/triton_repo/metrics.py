"""The scheduler's figures as Triton's custom metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from step35_trt.runtime.scheduling.requests import Metrics

COUNTERS: dict[str, tuple[str, Callable[[Metrics], dict[str, int]]]] = {
    "step35_requests": (
        "Requests by how they ended",
        lambda m: {
            "finished": m.finished,
            "cancelled": m.cancelled,
            "timeout": m.timed_out,
            "failed": m.failed,
            "preempted": m.preempted,
        },
    ),
    "step35_tokens": (
        "Tokens: of prompts, of those found in the cache, of answers, and run through the decoder",
        lambda m: {
            "prompt": m.prompt_tokens,
            "reused": m.reused_tokens,
            "generated": m.generated_tokens,
            "run": m.step_tokens,
        },
    ),
    "step35_steps": ("Decoder steps", lambda m: {"decoder": m.steps}),
    "step35_drafted_tokens": ("Drafts by MTP head", lambda m: _by_head(m.drafted)),
    "step35_accepted_tokens": ("Drafts that were confirmed, by MTP head", lambda m: _by_head(m.accepted)),
}
GAUGES: dict[str, tuple[str, Callable[[Metrics], dict[str, int]]]] = {
    "step35_open_requests": ("Requests now", lambda m: {"running": m.running, "waiting": m.waiting}),
    "step35_cache_rows": ("Rows of KV cache", lambda m: {"free": m.free_rows}),
}


class TritonMetrics:
    """Publishes figures; each kind of a family is a label.

    Args:
        backend: The module `triton_python_backend_utils`.
        model: The model's name, a label of every metric.
    """

    def __init__(self, backend: Any, model: str) -> None:
        self._model = model
        self._counters = self._families(backend, COUNTERS, backend.MetricFamily.COUNTER)
        self._gauges = self._families(backend, GAUGES, backend.MetricFamily.GAUGE)
        self._metrics: dict[tuple[str, str], Any] = {}
        self._published: dict[tuple[str, str], int] = {}

    def publish(self, metrics: Metrics) -> None:
        """Bring the server's metrics up to these figures."""
        for name, (_, read) in COUNTERS.items():
            for kind, value in read(metrics).items():
                new = value - self._published.get((name, kind), 0)
                if new or (name, kind) not in self._published:
                    self._metric(self._counters, name, kind).increment(new)
                self._published[name, kind] = value
        for name, (_, read) in GAUGES.items():
            for kind, value in read(metrics).items():
                if value != self._published.get((name, kind)):
                    self._metric(self._gauges, name, kind).set(value)
                self._published[name, kind] = value

    @staticmethod
    def _families(backend: Any, table: dict[str, Any], kind: Any) -> dict[str, Any]:
        return {
            name: backend.MetricFamily(name=name, description=description, kind=kind)
            for name, (description, _) in table.items()
        }

    def _metric(self, families: dict[str, Any], name: str, kind: str) -> Any:
        if (name, kind) not in self._metrics:
            labels = {"model": self._model, "kind": kind}
            self._metrics[name, kind] = families[name].Metric(labels=labels)
        return self._metrics[name, kind]


def _by_head(counts: tuple[int, ...]) -> dict[str, int]:
    return {str(head): count for head, count in enumerate(counts)}
