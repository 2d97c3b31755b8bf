"""Sequences of a device session share steps, pages and prefixes, and get what each gets alone."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.gpu_sources import CheckpointSource
from step35_trt.checkpoint import Checkpoint
from step35_trt.errors import DoesNotFitError
from step35_trt.lower import ModelPrograms
from step35_trt.runtime.cache import cache_extent
from step35_trt.runtime.cache.cache_extent import Extent
from step35_trt.runtime.session import Call
from step35_trt.runtime.session_cuda import device_runner, device_weights
from step35_trt.runtime.session_program import ProgramSession
from tests.cpu.conftest import GEOMETRIES
from tests.cpu.runtime.streams import MODULES, Running, Stream, interleave
from tests.forms import forms
from tests.tape import TapeRecorder

if TYPE_CHECKING:
    from pathlib import Path

    from step35_trt.runtime.device.device_runner import DeviceRunner
    from step35_trt.runtime.device.device_weights import DeviceWeights
    from step35_trt.runtime.programs.orders import StepOrder

CPU = torch.device("cpu")
PAGE = 16
LENGTH = 90  # five pages and more
SHARED = 2 * PAGE + 2  # tokens that all streams begin with: what module 1 sees from the second page
LARGEST = 20  # tokens of a call
EXTENT = Extent(slots=4, rows=LENGTH + 10, call=4 * (LARGEST + 3), page=PAGE)
NONE = np.empty(0, np.int64)


@dataclass
class Guarded:
    """A runner that sees what a step does to pages which others may be reading, and counts tokens."""

    runner: DeviceRunner
    session: ProgramSession | None = None
    computed: dict[int, int] = field(default_factory=dict)  # by graph

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def run(self, step: StepOrder, hidden: Any = None) -> Any:
        self.computed[step.graph] = self.computed.get(step.graph, 0) + len(step.token_ids)
        before = self.findable()
        result = self.runner.run(step, hidden)
        for one, other in zip(before, self.findable(), strict=True):
            np.testing.assert_array_equal(one, other)
        return result

    def findable(self) -> list[Any]:
        """What lies in pages that sequences may begin with."""
        assert self.session is not None
        assert self.session._account is not None
        caches, found = self.runner.kernels.caches, []
        for spec in caches.layout.tables:
            pages = sorted(self.session._account.pools[spec.name]._keys)
            for layer in spec.layers:
                found += [kept[layer][pages].numpy() for kept in (caches.keys, caches.values)]
        return found


@dataclass(frozen=True)
class Model:
    checkpoint: Checkpoint
    made: ModelPrograms
    weights: DeviceWeights

    @classmethod
    def of(cls, directory: Path) -> Model:
        checkpoint = Checkpoint.open(directory)
        whole = forms(checkpoint.config, "fp32")
        made = ModelPrograms.of(checkpoint.config, whole)
        return cls(checkpoint, made, device_weights(made, CheckpointSource(checkpoint, whole, CPU), CPU))

    def session(self, extent: Extent, record: TapeRecorder | None = None) -> ProgramSession:
        """Caches of its own, with NaN wherever nothing was written."""
        config = self.checkpoint.config
        runner = device_runner(config, self.made, self.weights, extent, torch.float32, record)
        for kept in (runner.kernels.caches.keys, runner.kernels.caches.values):
            for pages in kept.values():
                pages.fill_(torch.nan)
        guarded: Any = Guarded(runner)
        guarded.session = ProgramSession(config, guarded, extent.rows, extent.call, extent.slots)
        return guarded.session


@pytest.fixture(scope="module")
def models(checkpoints: dict[str, Path]) -> dict[str, Any]:
    """Of each geometry the model and its streams."""
    whole, made = replace(EXTENT, call=LENGTH), {}
    for name, checkpoint in checkpoints.items():
        model = Model.of(checkpoint)
        made[name] = model, Stream.several(model.session(whole), 3, LENGTH, SHARED)
    return made


def room(sequences: int) -> Extent:
    """Pages for so many whole sequences."""
    return replace(EXTENT, cached=sequences * -(-EXTENT.rows // PAGE) * PAGE)


@pytest.mark.parametrize("geometry", list(GEOMETRIES))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_interleaving_gives_each_sequence_what_it_gets_alone(
    models: dict[str, Any], geometry: str, data: st.DataObject
) -> None:
    """Whatever is kept of ended sequences: windows find their pages wherever there are rows without one."""
    model, streams = models[geometry]
    record = TapeRecorder() if data.draw(st.booleans(), "recorded") else None
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans(), "nothing idle"):
            patch.setattr(cache_extent, "idle_pages", lambda *_: 0)
        session = model.session(room(data.draw(st.integers(2, 3), "room")), record)
    fresh = session.capacity
    interleave(data, session, streams, PAGE, LARGEST)
    assert session.capacity == fresh
    assert all(not pool.held for pool in session._account.pools.values())


@pytest.mark.parametrize("geometry", list(GEOMETRIES))
def test_what_is_found_is_not_computed(models: dict[str, Any], geometry: str) -> None:
    model, streams = models[geometry]
    session = model.session(EXTENT, TapeRecorder())
    computed = session.runner.computed
    first = Running(session.open(), streams[0], MODULES)
    assert first.follow(LENGTH) == sum(LENGTH - module for module in range(MODULES + 1))
    running = session.capacity
    # What runs can be shared as well, except what may still be taken back.
    assert session.open(streams[1].ids, 2).length == SHARED // PAGE * PAGE
    assert session.open(streams[1].ids, MODULES).length == SHARED // PAGE * PAGE - PAGE
    assert session.open(streams[0].ids[: 2 * PAGE], 0).length == PAGE  # one token of a prompt has to run
    assert session.open(streams[0].ids[: 2 * PAGE + 1], 2).length == PAGE  # module 1 looks two ahead
    assert session.open(streams[0].ids).length == 4 * PAGE
    assert session.capacity == running
    first.sequence.close()
    assert session.capacity.rows == EXTENT.pages(0) * PAGE
    computed.clear()
    again = Running(session.open(streams[0].ids[:-1], 2), streams[0], 2)
    begun = again.sequence.length
    assert begun == 5 * PAGE
    again.follow(LENGTH)
    assert computed == {graph: LENGTH - begun - graph for graph in range(3)}


def test_prefixes_go_when_room_is_needed(models: dict[str, Any]) -> None:
    model, streams = models["large-window"]
    session = model.session(room(2))
    one = Running(session.open(), streams[0], 0)
    one.follow(LENGTH)
    one.sequence.close()
    filler = session.open()
    filler.decode(np.zeros(LENGTH, np.int64), NONE)
    assert session.open(streams[0].ids, 0).length == 5 * PAGE  # beside it there was room
    more = session.open()
    more.decode(np.ones(4 * PAGE, np.int64), NONE)
    assert session.open(streams[0].ids, 0).length < 5 * PAGE
    assert session.capacity.rows == room(2).pages(0) * PAGE - session.capacity.rows_for(LENGTH) - 4 * PAGE
    with pytest.raises(DoesNotFitError, match="more rows are needed"):
        session.open().decode(np.ones(5 * PAGE, np.int64), NONE)


@pytest.mark.parametrize(
    ("filled", "size", "text"),
    [(0, 70, "context limit"), (90, 50, "more rows"), (0, 61, "61 tokens"), (0, 58, "61 tokens")],
)
def test_a_step_takes_all_or_nothing(models: dict[str, Any], filled: int, size: int, text: str) -> None:
    """Too long for the context, for what is free, or for a step: every sequence is as before."""
    session = models["small-window"][0].session(replace(room(2), call=60))
    fits, passes, filler = session.open(), session.open(), session.open()
    fits.decode(np.arange(40), NONE)
    passes.decode(np.arange(33), NONE)
    for start in range(0, filled, 45):
        filler.decode(np.arange(start, start + 45), NONE)
    held = session.capacity
    calls = [Call(fits, np.arange(3), NONE), Call(passes, np.zeros(size, np.int64), NONE)]
    with pytest.raises(DoesNotFitError, match=text):
        session.decode(calls)
    assert (fits.length, passes.length) == (40, 33)
    assert session.capacity == held
    assert fits.decode(np.arange(3), NONE).hidden.shape[0] == 3


def test_windows_give_pages_back(models: dict[str, Any]) -> None:
    """All but those with rows that are seen from the earliest one which may be taken back."""
    session = models["small-window"][0].session(EXTENT)
    sequence = session.open()
    for start in range(0, LENGTH, 30):
        sequence.decode(np.arange(start, start + 30), NONE)
    held = {name: pool.held for name, pool in session._account.pools.items()}
    assert (held["0.0"], held["0.8"]) == (6, 2)


def test_an_end_that_a_collector_finds(models: dict[str, Any]) -> None:
    session = models["small-window"][0].session(room(1))
    sequence: Any = session.open()
    sequence.decode(np.arange(30), NONE)
    ring = [sequence]
    ring.append(ring)
    del sequence, ring
    gc.collect()
    assert session.capacity.sequences == EXTENT.slots
    assert session.capacity.rows == room(1).pages(0) * PAGE
    closed = session.open()
    closed.close()
    closed.close()
    with pytest.raises(AssertionError, match="closed"):
        closed.decode(np.arange(5), NONE)
