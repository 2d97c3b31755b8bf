"""Steps whose numbers lie on the device: against the definition, and recorded against as they come."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from benchmarks.gpu_sources import CheckpointSource
from step35_trt.checkpoint import Checkpoint
from step35_trt.errors import DoesNotFitError
from step35_trt.lower import ModelPrograms
from step35_trt.resources import NANO
from step35_trt.runtime.cache.cache_extent import Extent
from step35_trt.runtime.decoding.generate import generate
from step35_trt.runtime.decoding.sampling import SamplingParams
from step35_trt.runtime.session import Call
from step35_trt.runtime.session_cuda import device_runner, device_weights
from step35_trt.runtime.session_program import ProgramSession
from step35_trt.runtime.session_torch import TorchSession
from tests.forms import forms
from tests.synthetic import raw_config, write_checkpoint
from tests.tape import TapeRecorder

if TYPE_CHECKING:
    from step35_trt.runtime.session import Session

CPU = torch.device("cpu")
EXTENT = Extent(slots=3, rows=400, call=48)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    raw = raw_config(layers=5, modules=2, moe_num_experts=5, moe_top_k=2)
    return Checkpoint.open(write_checkpoint(tmp_path_factory.mktemp("device") / "checkpoint", raw))


def session_of(checkpoint: Checkpoint, record: TapeRecorder | None = None) -> ProgramSession:
    whole = forms(checkpoint.config, "fp32")
    made = ModelPrograms.of(checkpoint.config, whole)
    weights = device_weights(made, CheckpointSource(checkpoint, whole, CPU), CPU)
    runner = device_runner(checkpoint.config, made, weights, EXTENT, torch.float32, record)
    return ProgramSession(checkpoint.config, runner, EXTENT.rows, EXTENT.call, EXTENT.slots)


def story(session: Session) -> list[np.ndarray]:
    """Prompts in chunks, past a ring's end; sequences that come and go, in any order; drafts taken back."""
    rng, found = np.random.default_rng(0), []

    def ids(count: int) -> np.ndarray:
        return rng.integers(0, 97, count)

    def note(steps: list) -> None:
        for step in steps:
            found.extend((step.logits, step.hidden))

    def whole(sequence: object, count: int) -> Call:
        return Call(sequence, ids(count), np.arange(count))

    first, second = session.open(), session.open()
    for _ in range(5):  # 200 rows: window layers give back the first page
        note(session.decode([whole(first, 40)]))
    hidden = found[-1]
    note(session.decode([whole(second, 30), whole(first, 2)]))
    note(session.decode([whole(first, 1), whole(second, 1)]))
    note(session.decode([whole(second, 1), whole(first, 1)]))
    note(session.decode([whole(second, 1), whole(first, 3)]))
    first.truncate(first.length - 2)
    note(session.decode([whole(second, 2), whole(first, 2)]))
    note(session.draft(1, [Call(first, ids(9), np.array([8]), hidden[:9])]))
    for start in (9, 11, 13):
        note(session.draft(1, [Call(first, ids(2), np.array([1]), hidden[start : start + 2])]))
    second.close()
    third = session.open()
    note(session.decode([whole(third, 4)]))
    note(session.decode([whole(first, 1), whole(third, 1)]))
    note(session.decode([whole(third, 4)]))
    return found


def test_steps_are_the_model_s(checkpoint: Checkpoint) -> None:
    got, want = story(session_of(checkpoint)), story(TorchSession.of(checkpoint))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)


def test_a_recording_serves_whatever_comes(checkpoint: Checkpoint) -> None:
    """Other ids, lengths, slots and sequences than those it was made with, and not a bit differs."""
    recorder = TapeRecorder()
    got, want = story(session_of(checkpoint, recorder)), story(session_of(checkpoint))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)
    # Of the decoder 2 of 2, 4 of 2 (1 + 3, 2 + 2) and 4 of 1; of the module 2 of 1. Prompts are not recorded.
    assert (recorder.recorded, recorder.replayed) == (4, 6)


def test_a_recording_cannot_look_at_values() -> None:
    with pytest.raises(RuntimeError, match="waits for the device"):
        TapeRecorder()(lambda: torch.ones(1).item())


def test_drafts_change_no_token() -> None:
    nano = Checkpoint.open(NANO)
    session = session_of(nano, TapeRecorder())
    prompt = list(range(100, 120))

    def answer(drafts: int) -> list[int]:
        chunks = generate(session, prompt, SamplingParams(), max_tokens=9, draft_tokens=drafts)
        return [token for chunk in chunks for token in chunk]

    assert answer(0) == answer(3)


def test_what_was_recorded_stays_where_it_is(checkpoint: Checkpoint) -> None:
    session = session_of(checkpoint, TapeRecorder())
    arena = session.runner.executor._arena.data_ptr()
    story(session)
    assert session.runner.executor._arena.data_ptr() == arena
    sequence = session.open()
    with pytest.raises(DoesNotFitError, match="49 tokens, where 48"):
        sequence.decode(np.zeros(49, np.int64), np.array([0]))
