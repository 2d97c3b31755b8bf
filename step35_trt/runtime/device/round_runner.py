"""Runs packed rounds on one device: steps one after the other, and nothing read back but ids at the end.

A round is one upload of numbers, a recording for each step, and one small copy to the host. What a step needs
of those before it lies on the device: hidden rows (`HeldRows`) and drafted ids. Steps are recorded by
themselves rather than rounds as a whole, for how many rows a module runs differs from round to round: shapes
of a module are as many as sums of the sequences' rows, and those of rounds would be their products, each with
a decoder in it. Between two recordings the device waits for nobody.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from step35_trt.runtime.device.device_shapes import Placed, Shape, numbers
from step35_trt.runtime.programs.orders import DECODER

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from step35_trt.runtime.device.device_runner import DeviceRunner
    from step35_trt.runtime.programs.orders import StepOrder
    from step35_trt.runtime.programs.round_order import RoundOrder
    from step35_trt.runtime.session import Ids

KEPT = 512  # recordings: those of modules are small, and there are more of them


class RoundRunner:
    """Rounds over a `DeviceRunner`.

    Attributes:
        queries: The most tokens of a sequence in a step.
    """

    def __init__(self, runner: DeviceRunner) -> None:
        self._runner = runner
        self.queries = runner.kernels.queries
        self._modules = len(runner.programs) - 1
        slots = runner.kernels.caches.extent.slots
        tokens = slots * self.queries
        # By place (`Part.place`): the decoder, modules that draft, then those without logits.
        regions = 1 + 2 * self._modules, sum(Shape(DECODER, tokens, tokens, slots).sizes)
        self._sent, self._numbers = self._pair(*regions)
        # By slot: the drafts, then what the decoder says after each of its tokens.
        self._received, self._found = self._pair(slots, self._modules + self.queries)
        # With what they refer to: a recording keeps nothing alive by itself.
        self._replays: dict[tuple[Shape, int], tuple[Callable[[], None], Placed]] = {}

    def run(self, order: RoundOrder) -> tuple[Ids, Ids]:
        """Run a round.

        Returns:
            By slot, `[slots, modules]` drafts and `[slots, queries]` of what the decoder says; of slots that
            took part as many of each as were asked for, -1 where a logit is not finite. Valid until the next
            round.
        """
        self.start(order)
        self._received.copy_(self._found, non_blocking=True)
        if self._runner.device.type == "cuda":
            torch.cuda.current_stream(self._runner.device).synchronize()
        found: Ids = self._received.numpy()
        return found[:, : self._modules], found[:, self._modules :]

    def start(self, order: RoundOrder) -> None:
        """Run a round of which nobody here wants to know what it came to."""
        with torch.inference_mode():
            self._runner.kernels.caches.move(order.moves)
            places = [self._place(step) for step in order.steps]
            self._send(order, places)
            for step, place in zip(order.steps, places, strict=True):
                self._step(Shape.of(step), place)

    def _place(self, step: StepOrder) -> int:
        return step.graph if step.graph == DECODER or len(step.rows) else self._modules + step.graph

    def _send(self, order: RoundOrder, places: list[int]) -> None:
        """All steps' numbers at once."""
        self._runner.sent_before()
        sent = self._sent.numpy()
        for step, place in zip(order.steps, places, strict=True):
            values = numbers(step)
            sent[place, : len(values)] = values
        used = 1 + max(places)
        self._numbers[:used].copy_(self._sent[:used], non_blocking=True)
        self._runner.sending()

    def _step(self, shape: Shape, place: int) -> None:
        """A replay, from the second time on."""
        key = shape, place
        if key in self._replays:
            self._replays[key][0]()
            return
        bound = self._runner.executor.bind(self._runner.programs[shape.graph], shape.tokens, shape.rows)
        placed = Placed(bound, self._numbers[place, : sum(shape.sizes)], self._sent[place], None)
        record = self._runner.record
        if record is None:
            self._work(shape, placed)
            return
        if len(self._replays) == KEPT:
            self._replays.pop(next(iter(self._replays)))
        self._replays[key] = record(partial(self._work, shape, placed)), placed

    def _work(self, shape: Shape, placed: Placed) -> None:
        """What is recorded. Doing it again changes nothing, as recorders demand."""
        bound = placed.bound
        ids, rows = placed.parts(shape)[:2]
        packing = placed.packing(shape)
        drafts = self._found[packing.token_slots, (-1 - ids).clamp(min=0)].clamp(min=0)
        ids.copy_(torch.where(ids < 0, drafts, ids))
        if shape.graph != DECODER:
            bound.inputs["carried"].copy_(self._runner.held.take(shape.graph - 1, packing))
        self._runner.launch(shape, placed)
        if not shape.rows:
            return
        if shape.graph == DECODER:
            column = self._modules + packing.offsets[rows]
        else:
            column = torch.full_like(rows, shape.graph - 1)
        self._found.index_put_((packing.token_slots[rows], column), likeliest(bound.outputs["logits"]))

    def _pair(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """int64 zeros on the host, pinned where the device copies, and on the device."""
        host = torch.zeros(rows, columns, dtype=torch.int64)
        if self._runner.device.type == "cuda":
            host = host.pin_memory()
        return host, torch.zeros(rows, columns, dtype=torch.int64, device=self._runner.device)


def likeliest(logits: Tensor) -> Tensor:
    """`sampling.greedy` on the device: ids `[r]` of the largest of `[r, V]`, -1 for rows that are not finite.

    Of equal values `argmax` promises the first, on every device, which `max` does not.
    """
    low, high = logits.aminmax(dim=1)  # a NaN survives both
    return logits.argmax(1).masked_fill(~(low.isfinite() & high.isfinite()), -1)
