"""Rounds in one call of ONNX Runtime: against the same call by call, whatever stands of what is drafted."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from step35_trt.errors import DoesNotFitError, VerificationError
from step35_trt.runtime.cache.kv_pages import PAGE_ROWS
from step35_trt.runtime.decoding.drafting import DraftChain, take_back
from step35_trt.runtime.decoding.generate import generate
from step35_trt.runtime.decoding.sampling import SamplingParams, greedy
from step35_trt.runtime.rounds_onnx import QUERIES
from step35_trt.runtime.session import RoundCall
from tests.cpu.conftest import GEOMETRIES
from tests.cpu.runtime.decoding.test_drafting import finish
from tests.cpu.runtime.fakes import Scripted, flat
from tests.engines import engine

if TYPE_CHECKING:
    from pathlib import Path

    from step35_trt.runtime.session_onnx import OnnxSession

MODULES = 3
GREEDY = SamplingParams()
NONE = np.empty(0, np.int64)
INT4 = "large-window int4"  # products in chains


@pytest.fixture(scope="module")
def sessions(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("rounds")
    made = {name: engine(checkpoint, root / name) for name, checkpoint in checkpoints.items()}
    return made | {INT4: engine(checkpoints[INT4.removesuffix(" int4")], root / "int4", "cpu-int4")}


@dataclass
class Pair:
    """A sequence of rounds and one of steps with the same tokens; the test decides which drafts stand."""

    session: OnnxSession
    tokens: list[int]
    sequences: list[Any] = field(default_factory=list)
    chains: list[DraftChain] = field(default_factory=list)

    def __post_init__(self) -> None:
        for _ in range(2):
            sequence = self.session.open()
            chain = DraftChain(sequence, MODULES, self.session.prefill_chunk)
            hidden = sequence.decode(np.array(self.tokens[:-1]), NONE).hidden
            finish(self.session, chain.observe(hidden, self.tokens))
            finish(self.session, chain.catch_up(MODULES, self.tokens))
            self.sequences.append(sequence)
            self.chains.append(chain)

    def call(self, depth: int) -> RoundCall:
        return RoundCall(self.sequences[0], self.tokens, depth, MODULES)

    def by_steps(self, depth: int, accepted: int, token: int) -> tuple[list[int], list[int]]:
        """Drafts and choices call by call; then `accepted` drafts and `token` are the truth for both."""
        whole, stepwise = self.sequences
        chain, rows = self.chains[1], stepwise.length
        rng = np.random.default_rng(0)
        proposal = finish(self.session, chain.propose(depth, self.tokens, GREEDY, rng))
        ids = np.array([self.tokens[-1], *proposal.token_ids])
        step = stepwise.decode(ids, np.arange(len(ids)))
        choices = greedy(step.logits).tolist()
        stepwise.truncate(rows + 1 + accepted)
        whole.truncate(rows + 1 + accepted)
        chain.settle(accepted)
        take_back(whole, rows, depth, accepted)
        self.tokens += [*proposal.token_ids[:accepted], token]
        finish(self.session, chain.observe(step.hidden[: accepted + 1], self.tokens))
        return list(proposal.token_ids), choices


rounds = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 40)), min_size=3, max_size=3)


@pytest.mark.parametrize("geometry", list(GEOMETRIES))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompts=st.lists(st.integers(4, 90), min_size=1, max_size=3),
    history=st.lists(rounds, min_size=1, max_size=14),
)
def test_rounds_say_what_steps_say(
    sessions: dict[str, Any], geometry: str, prompts: list[int], history: list[Any]
) -> None:
    """Several sequences in a round, of depths of their own, some of whose modules have long not been used."""
    session: OnnxSession = sessions[geometry]
    rng = np.random.default_rng(prompts)
    pairs = [Pair(session, rng.integers(0, 40, length).tolist()) for length in prompts]
    for turn in history:
        wanted = [(depth, min(right, depth), token) for depth, right, token in turn][: len(pairs)]
        calls = [pair.call(depth) for pair, (depth, _, _) in zip(pairs, wanted, strict=False)]
        assert session.rounds is not None
        results = session.rounds.round(calls)
        for pair, result, decision in zip(pairs, results, wanted, strict=False):
            assert (list(result.drafts), list(result.choices)) == pair.by_steps(*decision)
            assert pair.sequences[0].length == pair.sequences[1].length
    for pair in pairs:
        lags = [pair.sequences[0].length - pair.sequences[0].draft_length(k) for k in range(MODULES)]
        assert max(lags) <= 2 * QUERIES


def test_modules_nobody_drafts_with_are_fed(sessions: dict[str, Any]) -> None:
    """Many rounds without them, then all at once: what they draft is what they would have drafted."""
    session: OnnxSession = sessions["small-window"]
    pair = Pair(session, [5, 3, 8, 1, 2])
    assert session.rounds is not None
    for turn in range(3 * QUERIES):
        depth = 3 if turn in (2 * QUERIES + 5, 3 * QUERIES - 1) else turn % 2
        (result,) = session.rounds.round([pair.call(depth)])
        assert (list(result.drafts), list(result.choices)) == pair.by_steps(
            depth, turn % 2 and depth, turn % 40
        )


def test_who_will_soon_be_too_far_behind_is_fed_with_who_is(sessions: dict[str, Any]) -> None:
    """In one step, and not one sequence after the other."""
    session: OnnxSession = sessions["large-window"]
    pairs = [Pair(session, [5, 3, 8, 1, 2]), Pair(session, [7, 1, 4, 4, 9, 2])]

    def lags() -> list[int]:
        return [pair.sequences[0].length - pair.sequences[0].draft_length(1) for pair in pairs]

    behind = []
    for turn in range(QUERIES + 3):
        last = turn == QUERIES + 2
        depths = (3 * last, 3 * (turn == 9 or last))
        behind.append(lags())
        assert session.rounds is not None
        results = session.rounds.round([pair.call(n) for pair, n in zip(pairs, depths, strict=True)])
        for pair, result, depth in zip(pairs, results, depths, strict=True):
            assert (list(result.drafts), list(result.choices)) == pair.by_steps(depth, 0, turn)
    due = behind.index([QUERIES + 1, 21])
    assert behind[due + 1] == [2, 22 - QUERIES // 2]


@pytest.mark.parametrize("rows", range(PAGE_ROWS - 4, PAGE_ROWS + 3))
def test_a_module_is_fed_and_drafts_where_a_page_ends(sessions: dict[str, Any], rows: int) -> None:
    session: OnnxSession = sessions["small-window"]
    pair = Pair(session, [token % 40 for token in range(rows - QUERIES + 1)])
    for turn in range(QUERIES + 1):
        depth = 3 if turn == QUERIES else 0
        lag = pair.sequences[0].length - pair.sequences[0].draft_length(0)
        assert lag == turn + 1
        assert session.rounds is not None
        (result,) = session.rounds.round([pair.call(depth)])
        assert (list(result.drafts), list(result.choices)) == pair.by_steps(depth, 0, turn)


@pytest.mark.parametrize("geometry", [*GEOMETRIES, INT4])
@pytest.mark.parametrize("depths", [[1], [3], [0, 2, 0, 0, 3, 1]])
def test_answers_are_those_of_a_bundle_without_rounds(
    sessions: dict[str, Any], geometry: str, depths: list[int]
) -> None:
    session: OnnxSession = sessions[geometry]
    earlier = replace(
        session,
        program=session.program.model_copy(update={"rounds": ()}),
    )
    assert earlier.rounds is None
    answers = [
        flat(generate(one, range(4, 30), GREEDY, max_tokens=40, draft_tokens=Scripted(depths)))
        for one in (session, earlier)
    ]
    assert answers[0] == answers[1]
    assert len(answers[0]) == 40


def test_a_round_without_pages_changes_nothing(sessions: dict[str, Any]) -> None:
    session: OnnxSession = sessions["small-window"]
    small = replace(session, cache_tokens=3 * PAGE_ROWS)
    pairs = [small.open() for _ in range(2)]
    for sequence in pairs:
        sequence.decode(np.arange(PAGE_ROWS - 1) % 7, NONE)
    calls = [RoundCall(sequence, [1], 0, 0) for sequence in pairs]
    assert small.rounds is not None
    small.rounds.round(calls)
    with pytest.raises(DoesNotFitError, match="more rows are needed"):
        small.rounds.round(calls)
    assert [sequence.length for sequence in pairs] == [PAGE_ROWS, PAGE_ROWS]
    small.rounds.round(calls[:1])
    assert [sequence.length for sequence in pairs] == [PAGE_ROWS + 1, PAGE_ROWS]


def test_the_context_limit_holds(sessions: dict[str, Any]) -> None:
    session: OnnxSession = replace(sessions["small-window"], max_tokens=24)
    pair = Pair(session, [1] * 22)
    assert session.rounds is not None
    with pytest.raises(DoesNotFitError, match="context limit of 24"):
        session.rounds.round([pair.call(3)])
    assert pair.sequences[0].length == 21
    (result,) = session.rounds.round([pair.call(2)])
    assert len(result.choices) == 3


@pytest.mark.parametrize("head", ["lm_head", "shared_head.output"])
@pytest.mark.parametrize("depth", [0, 2])
def test_logits_that_are_not_finite_are_told(
    sessions: dict[str, Any], tmp_path: Path, head: str, depth: int
) -> None:
    """Of the decoder at every depth, of a module where it drafts; nothing after them fails first."""
    session: OnnxSession = sessions["small-window"]
    damaged = _damaged(session.directory, tmp_path / "damaged", head)
    broken = replace(session, directory=damaged)
    if head != "lm_head" and not depth:  # no module runs
        assert flat(generate(broken, range(9), GREEDY, max_tokens=4, draft_tokens=0))
        return
    with pytest.raises(VerificationError, match="not finite"):
        flat(generate(broken, range(9), GREEDY, max_tokens=9, draft_tokens=depth))


def _damaged(bundle: Path, out: Path, head: str) -> Path:
    """A copy of a bundle in which a row of a head, the first module's or the decoder's, is not finite."""
    out.mkdir()
    for path in bundle.iterdir():
        (out / path.name).symlink_to(path)
    model = onnx.load(bundle / "round-2.onnx", load_external_data=False)
    tensor = min((t for t in model.graph.initializer if f"{head}.weight" in t.name), key=lambda t: t.name)
    place = {item.key: item.value for item in tensor.external_data}
    (out / "weights").unlink()
    (out / "weights").mkdir()
    for path in (bundle / "weights").iterdir():
        (out / "weights" / path.name).write_bytes(path.read_bytes())
    with (out / place["location"]).open("r+b") as file:
        file.seek(int(place["offset"]))
        file.write(np.full(tensor.dims[1], np.nan, np.float32).tobytes())
    return out
