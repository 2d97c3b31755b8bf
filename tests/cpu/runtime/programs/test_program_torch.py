"""Programs run by torch in one process: against the model itself, with weights in every form."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from step35_trt.bundle import Bundle
from step35_trt.checkpoint import Checkpoint
from step35_trt.errors import CorruptInputError, DoesNotFitError, UnsupportedError
from step35_trt.evaluate import evaluate
from step35_trt.gpu_weights import StoredWeights
from step35_trt.interpret.weights import FormedWeights
from step35_trt.program import SteppedProgram
from step35_trt.resources import NANO
from step35_trt.runtime.load import open_bundle, open_session
from step35_trt.runtime.programs.orders import StepOrder
from step35_trt.runtime.programs.program_loading import checkpoint_runner
from step35_trt.runtime.programs.program_weights import ProgramWeights, checkpoint_share, stored_share
from step35_trt.runtime.session import Call
from step35_trt.runtime.session_program import ProgramSession
from step35_trt.runtime.session_torch import TorchSession
from step35_trt.sharing import Sharing
from tests.forms import forms
from tests.ranks import shared_bundle

if TYPE_CHECKING:
    from pathlib import Path

    from step35_trt.sharing import Part, Way

NANO_CHECKPOINT = Checkpoint.open(NANO)
EVERYTHING: dict[Part, Way] = {
    "attention": "tensor",
    "routed experts": "expert",
    "shared expert": "tensor",
    "dense MLP": "tensor",
    "head": "tensor",
}
BOTH = {"attention": "tensor", "experts": "expert", "mlp": "tensor", "head": "tensor"}


def session_of(recipe: str, sequences: int = 2, longest: int = 256) -> ProgramSession:
    runner = checkpoint_runner(NANO_CHECKPOINT, forms(NANO_CHECKPOINT.config, recipe))
    return ProgramSession(NANO_CHECKPOINT.config, runner, longest, 32, sequences)


@pytest.mark.parametrize("recipe", ["fp32", "bf16", "int4-awq", "fp8-official"])
def test_a_program_is_the_model(recipe: str) -> None:
    """With the decoded weights, the very same arithmetic as the dialect's: not a bit differs."""
    weights = FormedWeights.of(NANO_CHECKPOINT, forms(NANO_CHECKPOINT.config, recipe))
    ids = np.random.default_rng(0).integers(0, 1024, 70)
    want = evaluate(TorchSession(NANO_CHECKPOINT.config, weights, prefill_chunk=32), ids)
    got = evaluate(session_of(recipe), ids)
    np.testing.assert_array_equal(got.logits, want.logits)
    np.testing.assert_array_equal(got.hidden, want.hidden)
    np.testing.assert_array_equal(got.mtp_logits, want.mtp_logits)


@pytest.mark.parametrize("recipe", ["fp32", "int4-awq", "int4-experts-fp8", "fp8-official"])
def test_shares_are_the_weights_cut(tmp_path: Path, recipe: str) -> None:
    """From a checkpoint and from a bundle alike; nothing is there of experts that another rank has."""
    whole = forms(NANO_CHECKPOINT.config, recipe)
    sharing, parallelism = Sharing(2, EVERYTHING), BOTH
    try:
        sharing.check(whole)
    except UnsupportedError:  # blocks that are wider than half of nano's matrices
        sharing, parallelism = Sharing(2, {"routed experts": "expert"}), {"experts": "expert"}
    bundle = Bundle.open(shared_bundle(NANO, tmp_path / "bundle", 2, recipe, **parallelism))
    assert isinstance(bundle.program, SteppedProgram)
    assert bundle.program.sharing == sharing
    stored = StoredWeights(bundle.directory, bundle.program.places(1), {}, sharing, 1)
    shares = checkpoint_share(NANO_CHECKPOINT, whole, sharing, 0), stored_share(stored, whole)
    for rank, share in enumerate(shares):
        want = FormedWeights.of(NANO_CHECKPOINT, whole, sharing, rank)
        same_weights(ProgramWeights(share, sharing.share(whole)), want)


def same_weights(got: ProgramWeights, want: FormedWeights) -> None:
    for name, shape in want.forms.shapes.items():
        if len(shape) < 3:
            assert torch.equal(got.tensor(name), want.tensor(name)), name
            continue
        for index in range(shape[0]):
            expert = got.expert(name, index)
            assert (expert is not None) == want.sharing.holds(name, index, shape[0], want.rank)
            assert expert is None or torch.equal(expert, want.expert(name, index)), name


def test_an_embedding_decodes_what_is_asked_for() -> None:
    whole = forms(NANO_CHECKPOINT.config, "int4-awq")
    name, ids = "model.embed_tokens.weight", torch.tensor([5, 0, 1023, 5])
    assert whole(name).dtype == "int8"
    weights = ProgramWeights(checkpoint_share(NANO_CHECKPOINT, whole, Sharing(), 0), whole)
    assert torch.equal(weights.embedding(ids, name), weights.tensor(name)[ids])


def test_buffers_stay_where_they_are() -> None:
    """What a CUDA graph needs: a call of the same numbers uses the same memory, also after other calls."""
    session = session_of("fp32")
    executor, program = session.runner.executor, session.runner.programs[0]
    executor.bind(program, 32, 32)  # the longest
    first = executor.bind(program, 4, 1)
    executor.bind(program, 7, 7)
    again = executor.bind(program, 4, 1)
    assert again is first
    starts = [buffer.data_ptr() for buffer in (*first.inputs.values(), *first.outputs.values())]
    sequence = session.open()
    for _ in range(3):
        sequence.decode(np.arange(4), np.array([3]))
    bound = executor.bind(program, 4, 1)
    assert starts == [buffer.data_ptr() for buffer in (*bound.inputs.values(), *bound.outputs.values())]


def test_a_step_is_the_caller_s() -> None:
    """What the next step computes does not change what an earlier one gave."""
    sequence = session_of("fp32").open()
    first = sequence.decode(np.arange(5), np.array([4]))
    logits, hidden = first.logits.copy(), first.hidden.copy()
    sequence.decode(np.arange(9, 14), np.array([4]))
    np.testing.assert_array_equal(first.logits, logits)
    np.testing.assert_array_equal(first.hidden, hidden)


def test_slots_are_given_back() -> None:
    session = session_of("fp32", sequences=2)
    first, second = session.open(), session.open()
    first.decode(np.arange(6), np.array([5]))
    assert session.capacity.sequences == 0
    assert session.capacity.rows == 2 * 256 - 6
    with pytest.raises(DoesNotFitError, match="2 sequences are open"):
        session.open()
    first.close()
    first.close()
    assert session.capacity.sequences == 1
    assert session.capacity.rows == 2 * 256
    third = session.open()
    assert third.slot == first.slot
    del second
    assert session.capacity.sequences == 1
    fresh = session_of("fp32").open()
    ids = np.array([3, 1, 4, 1, 5])
    got, want = (sequence.decode(ids, np.array([4])).logits for sequence in (third, fresh))
    np.testing.assert_array_equal(got, want)


def test_the_context_limit() -> None:
    session = session_of("fp32", longest=8)
    sequence = session.open()
    sequence.decode(np.arange(6), np.array([5]))
    with pytest.raises(DoesNotFitError, match="8"):
        session.decode([Call(sequence, np.arange(3), np.array([2]))])
    assert sequence.length == 6
    sequence.decode(np.arange(2), np.array([1]))


def test_a_program_of_another_model_is_refused(tmp_path: Path) -> None:
    bundle = Bundle.open(shared_bundle(NANO, tmp_path / "bundle", 1))
    assert isinstance(open_bundle(bundle.directory), ProgramSession)
    assert isinstance(bundle.program, SteppedProgram)
    program = bundle.program.model_copy(update={"mtp": ()})
    changed = bundle.model_copy(update={"program": program})
    with pytest.raises(CorruptInputError, match="is not what its model and recipe make"):
        open_session(changed)


sizes = st.integers(0, 1 << 62)


@given(
    graph=st.integers(0, 3),
    sequences=st.lists(st.tuples(st.integers(0, 99), sizes, st.integers(1, 9)), max_size=6),
    closed=st.lists(st.integers(0, 99), max_size=3),
    data=st.data(),
)
@settings(deadline=None)
def test_orders_arrive_as_they_were_given(
    graph: int, sequences: list[tuple[int, int, int]], closed: list[int], data: st.DataObject
) -> None:
    slots, pasts, lengths = (tuple(part) for part in zip(*sequences, strict=True)) if sequences else ((),) * 3
    tokens = data.draw(st.lists(sizes, min_size=sum(lengths), max_size=sum(lengths)))
    rows = data.draw(st.lists(st.integers(0, 99), max_size=9))
    ids, wanted = np.array(tokens, np.int64), np.array(rows, np.int64)
    order = StepOrder(graph, slots, pasts, lengths, ids, wanted, tuple(closed))
    rest = np.full(data.draw(st.integers(0, 5)), -1)
    got = StepOrder.decode(np.concatenate([order.encoded(), rest]))
    assert (got.graph, got.slots, got.pasts, got.lengths) == (graph, slots, pasts, lengths)
    assert got.closed == tuple(closed)
    np.testing.assert_array_equal(got.token_ids, ids)
    np.testing.assert_array_equal(got.rows, wanted)
