"""The CPU session: sequences that share steps, pages and prefixes get what each gets alone."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from step35_trt.errors import DoesNotFitError
from step35_trt.runtime.cache.kv_pages import PAGE_ROWS, pages_for
from step35_trt.runtime.programs.orders import DECODER
from step35_trt.runtime.session import Call
from tests.cpu.conftest import GEOMETRIES
from tests.cpu.runtime.streams import MODULES, Running, Stream, interleave
from tests.engines import engine

if TYPE_CHECKING:
    from pathlib import Path

    from step35_trt.runtime.session_onnx import OnnxSession

LENGTH = 230  # three pages and more, many windows of either geometry
SHARED = 2 * PAGE_ROWS + 2  # tokens that all streams begin with: what module 1 sees from the second page
STREAMS = 3
NONE = np.empty(0, np.int64)


def small(session: OnnxSession, sequences: int) -> OnnxSession:
    """The bundle over caches of its own for `sequences` sequences, with NaN wherever nothing was written."""
    rows = sequences * pages_for(LENGTH + 10) * PAGE_ROWS
    made = replace(session, max_tokens=LENGTH + 10, cache_tokens=rows)
    for graph in range(1 + MODULES):
        for array in made.caches(graph).pages.values():
            array.fill(np.nan)
    return made


@pytest.fixture(scope="module")
def bundles(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of each geometry a session and its streams."""
    root, made = tmp_path_factory.mktemp("bundles"), {}
    for name, checkpoint in checkpoints.items():
        session: Any = engine(checkpoint, root / name)
        made[name] = session, Stream.several(session, STREAMS, LENGTH, SHARED)
    return made


@pytest.mark.parametrize("geometry", list(GEOMETRIES))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_interleaving_gives_each_sequence_what_it_gets_alone(
    bundles: dict[str, Any], geometry: str, data: st.DataObject
) -> None:
    whole, streams = bundles[geometry]
    session = small(whole, data.draw(st.integers(2, 3), "room"))
    interleave(data, session, streams, PAGE_ROWS, 100)
    assert session.capacity == replace(session).capacity


@pytest.mark.parametrize("geometry", list(GEOMETRIES))
def test_a_finished_sequence_leaves_its_prefix(bundles: dict[str, Any], geometry: str) -> None:
    whole, streams = bundles[geometry]
    session = small(whole, 4)
    first = Running(session.open(), streams[0], 2)
    first.follow(LENGTH)
    running = session.capacity
    # What runs can be shared as well, except what may still be taken back.
    assert session.open(streams[1].ids, 2).length == SHARED // PAGE_ROWS * PAGE_ROWS
    assert session.open(streams[0].ids[: 128 + 1], 0).length == 128
    assert session.open(streams[0].ids[:128], 0).length == 64  # one token of a prompt has to run
    assert session.open(streams[0].ids[:130], 2).length == 128  # module 1 looks two tokens ahead
    assert session.open(streams[0].ids[:129], 2).length == 64
    assert session.open(streams[0].ids, 3).length == 0  # module 2 never ran
    assert session.capacity == running
    first.sequence.close()
    assert session.capacity.rows > running.rows
    again = Running(session.open(streams[0].ids[:-1], 2), streams[0], 2)
    assert again.sequence.length == 192
    again.follow(LENGTH)
    other = Running(session.open(streams[2].ids, 1), streams[2], 1)
    assert other.sequence.length == 128
    other.follow(LENGTH)


def test_pages_are_shared_as_far_as_modules_look_ahead(bundles: dict[str, Any]) -> None:
    whole, streams = bundles["small-window"]
    session = small(whole, 4)
    one = Running(session.open(), streams[0], MODULES)
    one.follow(LENGTH)
    found = [session.open(streams[1].ids, modules).length for modules in range(MODULES + 1)]
    assert found == [128, 128, 128, 64]


def test_prefixes_go_when_room_is_needed(bundles: dict[str, Any]) -> None:
    whole, streams = bundles["large-window"]
    session = small(whole, 2)
    one = Running(session.open(), streams[0], 0)
    one.follow(LENGTH)
    one.sequence.close()
    room = session.capacity.rows
    filler = session.open()
    filler.decode(np.zeros(LENGTH, np.int64), NONE)
    assert session.open(streams[0].ids, 0).length == 192  # beside it there was room
    more = session.open()
    more.decode(np.ones(PAGE_ROWS + 1, np.int64), NONE)
    assert session.open(streams[0].ids, 0).length < 192
    assert session.capacity.rows == room - session.capacity.rows_for(LENGTH) - 2 * PAGE_ROWS
    with pytest.raises(DoesNotFitError, match="more rows are needed"):
        session.open().decode(np.ones(3 * PAGE_ROWS, np.int64), NONE)


def test_a_module_that_took_other_tokens_is_not_reused(bundles: dict[str, Any]) -> None:
    whole, streams = bundles["small-window"]
    session = small(whole, 2)
    one = Running(session.open(), streams[0], 1)
    wrong = streams[0].ids[1:101].copy()
    wrong[3] = (wrong[3] + 1) % session.config.vocab_size
    one.sequence.decode(streams[0].ids[:120], NONE)
    one.sequence.draft(0, wrong, streams[0].hidden[0][:100], NONE)
    one.sequence.close()
    assert session.open(streams[0].ids, 0).length == 64
    assert session.open(streams[0].ids, 1).length == 0


def test_windows_give_pages_back(bundles: dict[str, Any]) -> None:
    whole, streams = bundles["small-window"]
    session = small(whole, 2)
    sequence = session.open()
    sequence.decode(streams[0].ids, NONE)
    pools = session.caches(DECODER).pools
    assert pools["full"].held == 4
    assert pools["window"].held == 1
    sequence.truncate(LENGTH - 8)
    with pytest.raises(AssertionError, match="taken back"):
        sequence.truncate(100)
    del sequence
    assert pools["full"].held == pools["window"].held == 0


def test_a_closed_sequence_cannot_run(bundles: dict[str, Any]) -> None:
    sequence = small(bundles["small-window"][0], 1).open()
    sequence.decode(np.arange(5), NONE)
    sequence.close()
    sequence.close()
    with pytest.raises(AssertionError, match="closed"):
        sequence.decode(np.arange(5), NONE)


def test_results_stay_as_long_as_somebody_has_a_view(bundles: dict[str, Any]) -> None:
    """Later calls write elsewhere; what nobody holds is written over."""
    session, streams = bundles["small-window"]
    held, other = session.open(), session.open()
    steps = [held.decode(streams[0].ids[i : i + 1], np.array([0])) for i in range(3)]
    views = [step.logits[0, 1:] for step in steps]
    expected = [view.copy() for view in views]
    hidden = [step.hidden for step in steps]
    hiddens = [value.copy() for value in hidden]
    del steps
    for ids in (streams[1].ids[:1], streams[1].ids[1:4], streams[1].ids[4:5]):
        other.decode(ids, np.arange(len(ids)))
    for got, want in zip([*views, *hidden], [*expected, *hiddens], strict=True):
        np.testing.assert_array_equal(got, want)
    del views, hidden, got
    before = other.decode(streams[1].ids[5:6], np.array([0])).logits.ctypes.data
    assert other.decode(streams[1].ids[6:7], np.array([0])).logits.ctypes.data == before


def test_a_step_takes_all_or_nothing(bundles: dict[str, Any]) -> None:
    """One call too long for the context, or for what is free: the other call's sequence is as before."""
    session = small(bundles["small-window"][0], 1)
    fits, passes = session.open(), session.open()
    fits.decode(np.arange(5), NONE)
    for size in (LENGTH + 11, LENGTH - 30):
        calls = [Call(fits, np.arange(3), NONE), Call(passes, np.zeros(size, np.int64), NONE)]
        with pytest.raises(DoesNotFitError):
            session.decode(calls)
        assert (fits.length, passes.length) == (5, 0)
    assert fits.decode(np.arange(3), NONE).hidden.shape[0] == 3
