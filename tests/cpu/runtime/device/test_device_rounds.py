"""Rounds run at once on a device: against the same by steps, and what the host waits for."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu_sources import CheckpointSource
from step35_trt.checkpoint import Checkpoint
from step35_trt.errors import DoesNotFitError, VerificationError
from step35_trt.lower import ModelPrograms
from step35_trt.resources import NANO
from step35_trt.runtime.cache.cache_extent import Extent
from step35_trt.runtime.decoding.calls import drive
from step35_trt.runtime.decoding.generate import generate
from step35_trt.runtime.decoding.generation import Generation
from step35_trt.runtime.decoding.generation_stats import GenerationStats
from step35_trt.runtime.decoding.sampling import SamplingParams, greedy
from step35_trt.runtime.device.held_rows import HeldRows, Packing
from step35_trt.runtime.device.round_runner import likeliest
from step35_trt.runtime.scheduling.requests import (
    Event,
    Finished,
    Limits,
    RequestHandle,
    TokenRequest,
    Tokens,
)
from step35_trt.runtime.scheduling.scheduler import Scheduler
from step35_trt.runtime.session import Call, RoundCall
from step35_trt.runtime.session_cuda import device_runner, device_weights
from step35_trt.runtime.session_program import ProgramSession
from tests.cpu.runtime.fakes import Scripted, flat
from tests.forms import forms
from tests.synthetic import raw_config, write_checkpoint
from tests.tape import TapeRecorder

if TYPE_CHECKING:
    from step35_trt.runtime.device.recording import Recorder

pytestmark = pytest.mark.early

CPU, GREEDY = torch.device("cpu"), SamplingParams()
NONE = np.empty(0, np.int64)
PAGE = 16
EXTENT = Extent(slots=4, rows=160, call=24, page=PAGE)
VOCABULARY = 6  # so few that random modules are right now and then


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    raw = raw_config(layers=5, modules=3, vocab_size=VOCABULARY, moe_num_experts=4, moe_top_k=2)
    return Checkpoint.open(write_checkpoint(tmp_path_factory.mktemp("rounds") / "checkpoint", raw))


def session_of(
    checkpoint: Checkpoint, record: Recorder | None = None, extent: Extent = EXTENT
) -> ProgramSession:
    whole = forms(checkpoint.config, "fp32")
    made = ModelPrograms.of(checkpoint.config, whole)
    weights = device_weights(made, CheckpointSource(checkpoint, whole, CPU), CPU)
    runner = device_runner(checkpoint.config, made, weights, extent, torch.float32, record)
    return ProgramSession(checkpoint.config, runner, extent.rows, extent.call, extent.slots)


def by_steps(checkpoint: Checkpoint, extent: Extent = EXTENT) -> ProgramSession:
    """The same without rounds."""
    session = session_of(checkpoint, extent=extent)
    session.runner.rounds = None  # type: ignore[misc]
    assert session.rounds is None
    return session


def prompt(length: int, seed: int = 0) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()
    return found


@pytest.mark.parametrize("depths", [[0], [3], [3, 0, 0, 0, 0, 0, 0, 3, 1, 2, 0, 0, 3], [1, 1, 1, 1, 3, 2, 0]])
def test_rounds_say_what_steps_say(checkpoint: Checkpoint, depths: list[int]) -> None:
    """Past windows of 8 in rings of few pages, drafts refused and accepted, modules left behind."""
    recorder = TapeRecorder()
    found = []
    for session in (session_of(checkpoint, recorder), by_steps(checkpoint)):
        stats = GenerationStats()
        policy = Scripted(depths)
        answer = generate(session, prompt(50), GREEDY, max_tokens=36, draft_tokens=policy, stats=stats)
        found.append((flat(answer), stats.rounds, stats.drafted, stats.accepted))
    assert found[0] == found[1]
    assert recorder.replayed > recorder.recorded
    if depths == [3]:
        _, _, drafted, accepted = found[0]
        assert 0 < sum(accepted) < sum(drafted), "some must be right, and some refused"


def test_steps_may_follow_rounds(checkpoint: Checkpoint) -> None:
    """Whatever was drafted and refused, the caches are those of true tokens."""
    logits = []
    for session in (session_of(checkpoint), by_steps(checkpoint)):
        answer = generate(session, prompt(20), GREEDY, max_tokens=60, draft_tokens=Scripted([3, 1, 0]))
        tokens = prompt(20) + [token for _ in range(25) for token in next(answer)][:30]
        sequence = session.open(np.array(tokens))
        assert sequence.length == 32, "two pages of what the answer took are found again"
        logits.append(sequence.decode(np.array(tokens[32:]), np.arange(len(tokens) - 32)).logits)
        answer.close()  # type: ignore[attr-defined]
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)


REQUESTS = [
    TokenRequest(prompt(45), 30, draft_tokens=3),
    TokenRequest(prompt(45), 30, draft_tokens="auto"),  # begins like the one before, and the last like both
    TokenRequest(prompt(1, 1), 30, SamplingParams(temperature=1.0, seed=3), draft_tokens=2),
    TokenRequest(prompt(17, 2), 30, draft_tokens=0),
    TokenRequest(prompt(33, 3), 12, SamplingParams(log_probabilities=True), draft_tokens=1),
    TokenRequest(prompt(9, 4), 30, draft_tokens="auto"),
    TokenRequest(prompt(30, 5), 30, SamplingParams(bad_words=((2,),)), draft_tokens=2),
    TokenRequest(prompt(45), 30, draft_tokens=1),
]
CANCELLED = (3, 6)


def test_many_requests_each_get_what_they_get_alone(checkpoint: Checkpoint) -> None:
    """Beside prompts, draws and log-probabilities; some cancelled, and some set back for want of pages."""
    extent = Extent(4, 160, 24, 112, PAGE)
    scheduler = Scheduler(session_of(checkpoint, TapeRecorder(), extent), Limits(sequences=4))
    answers: list[list[int]] = [[] for _ in REQUESTS]
    ends: list[Event] = []
    handles: list[RequestHandle] = []

    def sink(number: int, event: Event) -> None:
        if isinstance(event, Tokens):
            answers[number] += event.token_ids
            if number in CANCELLED and len(answers[number]) > 5:
                handles[number].cancel()
        else:
            ends.append(event)

    for number, request in enumerate(REQUESTS):
        handles.append(scheduler.submit(request, partial(sink, number)))
        scheduler.step()
    while not scheduler.idle:
        scheduler.step()
    assert all(isinstance(end, Finished) for end in ends)
    metrics = scheduler.metrics()
    assert (metrics.finished, metrics.cancelled, metrics.reused_tokens > 0) == (6, 2, True)
    assert metrics.preempted
    alone = by_steps(checkpoint)
    for number, (request, answer) in enumerate(zip(REQUESTS, answers, strict=True)):
        parts = generate(
            alone, request.prompt_ids, request.sampling, max_tokens=request.max_tokens, draft_tokens=2
        )
        if request.sampling.greedy:
            assert answer == flat(parts)[: len(answer)]
        assert len(answer) == request.max_tokens or number in CANCELLED


def test_nano_s_modules_are_mostly_right_and_change_no_token() -> None:
    session = session_of(Checkpoint.open(NANO), extent=Extent(1, 64, 32, page=PAGE))
    answers = []
    for drafts in (0, 3):
        stats = GenerationStats()
        parts = generate(session, range(100, 120), GREEDY, max_tokens=10, draft_tokens=drafts, stats=stats)
        answers.append(flat(parts))
    assert answers[0] == answers[1]
    assert stats.rounds < 9


@pytest.mark.parametrize("whole", [False, True])
def test_an_answer_goes_on_from_pages_that_hold_all_of_it(checkpoint: Checkpoint, whole: bool) -> None:
    """Given up after every call: it may go on where a page ends, with nothing left for a module to run."""
    session = session_of(checkpoint) if whole else by_steps(checkpoint)
    expected = flat(generate(session, prompt(10), GREEDY, max_tokens=40, draft_tokens=1))
    generation = Generation(session, prompt(10), GREEDY, max_tokens=40, draft_tokens=1)
    said, ends = [], set()
    while not generation.finished:
        ends.add((generation.known_tokens - 1) % PAGE)
        calls, known = generation.calls(), generation.known_tokens
        for _ in drive(session, calls):
            if generation.known_tokens > known:
                break
        calls.close()
        said += generation.take()
    assert said == expected
    assert 0 in ends


def begun(session: ProgramSession, tokens: list[int], depth: int, modules: int) -> RoundCall:
    """A sequence whose modules have all that they can have of a prompt, and the newest token 1."""
    sequence, ids = session.open(), np.array(tokens)
    hidden = sequence.decode(ids, NONE).hidden
    for module in range(modules):
        count = len(ids) - max(module, 1)
        following = ids[1 + module : 1 + module + count]
        hidden = sequence.draft(module, following, hidden[: len(following)], NONE).hidden
    return RoundCall(sequence, [*tokens, 1], depth, modules)


class Copies(TorchDispatchMode):
    """Counts what crosses between a device and the memory that the host has of its own: `host` tensors."""

    def __init__(self, host: list[torch.Tensor]) -> None:
        super().__init__()
        self.places = {tensor.untyped_storage().data_ptr() for tensor in host}
        self.up = self.down = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "copy_" in str(func) and "_to_copy" not in str(func):
            to, source = (tensor.untyped_storage().data_ptr() in self.places for tensor in args[:2])
            self.up += source and not to
            self.down += to and not source
        # What a session does with results of steps, and what a look at a value does.
        self.waits += "_local_scalar_dense" in str(func) or "nonzero" in str(func)
        self.waits += str(func) == "aten.to.device"
        return func(*args, **kwargs)


def test_the_host_sends_once_and_waits_once_a_round(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_of(checkpoint)
    rounds = session.rounds
    assert rounds is not None
    calls = [begun(session, prompt(length), 3, 3) for length in (20, 24)]
    runner = rounds.runner
    host = [runner._sent, runner._received]
    read: list[int] = []
    real = torch.Tensor.numpy

    def numpy(tensor: torch.Tensor, *arguments: Any, **settings: Any) -> Any:
        read.append(tensor.untyped_storage().data_ptr())
        return real(tensor, *arguments, **settings)

    monkeypatch.setattr(torch.Tensor, "numpy", numpy)
    with Copies(host) as copies:
        results = rounds.round(calls)
    assert (copies.up, copies.down, copies.waits) == (1, 1, 0)
    assert set(read) <= copies.places
    assert [len(result.drafts) for result in results] == [3, 3]
    # What is counted is there to be counted: a step gives logits and hidden rows to the host.
    with Copies(host) as copies:
        session.decode([Call(calls[0].sequence, np.array([1]), np.array([0]))])
    assert copies.waits == 2


def test_depths_may_differ_within_a_round(checkpoint: Checkpoint) -> None:
    """And results come in the order of the calls, whatever the slots."""
    answers = []
    for order in ([0, 1, 2], [2, 0, 1]):
        session = session_of(checkpoint)
        rounds = session.rounds
        assert rounds is not None
        calls = [begun(session, prompt(6, number), number, 2) for number in range(3)]
        results = rounds.round([calls[number] for number in order])
        answers.append({n: (r.drafts, r.choices) for n, r in zip(order, results, strict=True)})
        assert [call.sequence.length for call in calls] == [7, 8, 9]
        assert [call.sequence.draft_length(0) for call in calls] == [5, 6, 6]
    assert answers[0] == answers[1]


def test_a_round_without_pages_changes_nothing(checkpoint: Checkpoint) -> None:
    session = session_of(checkpoint, extent=Extent(2, 160, 24, 3 * PAGE, PAGE))
    rounds, calls = session.rounds, []
    assert rounds is not None
    for number in range(2):
        sequence = session.open()
        sequence.decode(np.array(prompt(PAGE - 1, number)), NONE)
        calls.append(RoundCall(sequence, [1], 0, 0))
    rounds.round(calls)
    with pytest.raises(DoesNotFitError, match="more rows are needed"):
        rounds.round(calls)
    assert [call.sequence.length for call in calls] == [PAGE, PAGE]
    assert session.capacity.rows == PAGE
    rounds.round(calls[:1])
    assert [call.sequence.length for call in calls] == [PAGE + 1, PAGE]


def test_the_context_limit_holds(checkpoint: Checkpoint) -> None:
    session = session_of(checkpoint, extent=Extent(1, 32, 24, page=PAGE))
    for drafts in range(4):
        answer = flat(generate(session, prompt(10), GREEDY, max_tokens=100, draft_tokens=drafts))
        assert len(answer) == 22
    sequence, rounds = session.open(), session.rounds
    assert rounds is not None
    sequence.decode(np.array(prompt(24)), NONE)
    sequence.decode(np.array(prompt(8)), NONE)
    with pytest.raises(DoesNotFitError, match="context limit of 32"):
        rounds.round([RoundCall(sequence, [1], 0, 0)])


def test_logits_that_are_not_finite_end_the_answer(checkpoint: Checkpoint) -> None:
    session = session_of(checkpoint)
    answer = generate(session, prompt(9), GREEDY, max_tokens=40, draft_tokens=1)
    next(answer)
    for pages in session.runner.kernels.caches.values.values():  # type: ignore[attr-defined]
        pages.fill_(math.nan)
    with pytest.raises(VerificationError, match="not finite"):
        flat(answer)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 4),
    vocabulary=st.integers(1, 300),
    levels=st.sampled_from([1, 2, 50]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_likeliest_is_the_host_s(
    seed: int, rows: int, vocabulary: int, levels: int, dtype: torch.dtype
) -> None:
    """Ties included, and zeros of both signs."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-levels, levels + 1, (rows, vocabulary)) * rng.choice([-0.25, 0.25])
    logits = torch.from_numpy(values).to(dtype)
    want = greedy(logits.float().numpy())
    np.testing.assert_array_equal(likeliest(logits).numpy(), want)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_nobody_s_choice(value: float) -> None:
    logits = torch.zeros(3, 7)
    logits[1, 4] = value
    assert likeliest(logits).tolist() == [0, -1, 0]


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_the_last_rows_of_each_sequence_are_held(lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    held = HeldRows.of(1, 4, 4, 2, torch.float32, CPU)
    slots = rng.permutation(4)[: len(lengths)]
    pasts = rng.integers(0, 50, len(lengths))

    def packing(counts: list[int], pasts: Any) -> Packing:
        owners = np.repeat(np.arange(len(counts)), counts)
        starts = np.cumsum([0, *counts])
        return Packing(*(torch.from_numpy(np.asarray(part)) for part in (starts, pasts, slots, owners)))

    for most in (40, 3):  # a long call, then a short one after it
        counts = [min(length, most) for length in lengths]
        given_to = packing(counts, pasts)
        rows = torch.stack([given_to.token_slots, given_to.positions], 1).float()
        held.keep(0, given_to, rows)
        held.keep(1, given_to, rows)  # of a graph whose rows nobody takes
        pasts = pasts + counts
    wanted = [min(16, 3 + length) if length > 3 else length for length in lengths]
    asked = packing(wanted, pasts - wanted)
    expected = torch.stack([asked.token_slots, asked.positions], 1).float()
    torch.testing.assert_close(held.take(0, asked), expected)
