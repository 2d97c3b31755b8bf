"""A round of drafting and verification: call by call, or at once where the session can do that.

What needs a draw, or looks at logits otherwise (bad words, log-probabilities), goes call by call: the host
decides between two calls. A greedy answer needs the ids alone, and the session finds those by itself. Without
drafts a round is a decoding step, of which then one id comes back instead of a row of logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from step35_trt.runtime.decoding.calls import ModelCall, round_of, step_of
from step35_trt.runtime.decoding.drafting import SHORT, Proposal, take_back
from step35_trt.runtime.decoding.sampling import (
    TargetRows,
    greedy,
    not_finite,
    verify,
    verify_greedy,
    without_bad_words,
)
from step35_trt.runtime.session import Call, RoundCall, rounds_of

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from step35_trt.runtime.decoding.calls import Calls
    from step35_trt.runtime.decoding.drafting import DraftChain
    from step35_trt.runtime.decoding.sampling import SamplingParams
    from step35_trt.runtime.session import Floats, Sequence, Session


@dataclass(frozen=True)
class Verified:
    """What a round came to.

    Attributes:
        drafts: K ids.
        accepted: How many of them stand.
        token: What follows those.
        logits: `[K + 1, V]`, the decoder's; None where nobody but the session saw them.
    """

    drafts: tuple[int, ...]
    accepted: int
    token: int
    logits: Floats | None


class Rounds(Protocol):
    """One sequence's rounds; for each of them `prepare`, `run` and `follow`, in this order."""

    def prepare(self, depth: int, tokens: SequenceOf[int]) -> Calls[None]:
        """Work off a backlog, which is no part of what `depth` drafts cost."""
        ...

    def run(self, depth: int, tokens: SequenceOf[int]) -> Calls[Verified]:
        """Draft, verify, and undo what was refused; `tokens` are all known."""
        ...

    def follow(self, tokens: SequenceOf[int]) -> Calls[None]:
        """Take the round's rows in; `tokens` are all known, the round's included."""
        ...


def together(session: Session, sampling: SamplingParams) -> bool:
    """Whether the rounds of answers that are drawn so can be run at once."""
    rounds = rounds_of(session)
    if rounds is None or not sampling.greedy or sampling.bad_words or sampling.log_probabilities:
        return False
    modules = session.config.num_nextn_predict_layers
    return modules <= rounds.drafts and max(modules + 1, SHORT) <= rounds.behind


def choose(
    proposal: Proposal,
    logits: Floats,
    tokens: SequenceOf[int],
    sampling: SamplingParams,
    rng: np.random.Generator,
) -> tuple[int, int]:
    """How many drafts stand, and the token after them, by the decoder's logits `[K + 1, V]`."""
    if bad_words := sampling.bad_words:
        logits = without_bad_words(logits, [*tokens, *proposal.token_ids], bad_words)
    if sampling.greedy:
        return verify_greedy(proposal.token_ids, greedy(logits))
    targets = TargetRows(logits, sampling)
    return verify(proposal.token_ids, proposal.weights, targets, rng)


@dataclass
class CallByCall:
    """`Rounds` by steps of the modules and the decoder, each decided about on the host.

    Attributes:
        sequence: The caches.
        chain: Its modules, as far as the decoder.
        sampling: How tokens are drawn.
        rng: Source of the draws.
    """

    sequence: Sequence
    chain: DraftChain
    sampling: SamplingParams
    rng: np.random.Generator
    _hidden: Floats | None = None

    def prepare(self, depth: int, tokens: SequenceOf[int]) -> Calls[None]:
        """See `Rounds`."""
        yield from self.chain.catch_up(depth, tokens)

    def run(self, depth: int, tokens: SequenceOf[int]) -> Calls[Verified]:
        """See `Rounds`."""
        proposal = yield from self.chain.propose(depth, tokens, self.sampling, self.rng)
        ids = np.array([tokens[-1], *proposal.token_ids], dtype=np.int64)
        step = yield from step_of(ModelCall(None, Call(self.sequence, ids, np.arange(len(ids)))))
        accepted, token = choose(proposal, step.logits, tokens, self.sampling, self.rng)
        if accepted < depth:
            self.sequence.truncate(self.sequence.length - (depth - accepted))
        self.chain.settle(accepted)
        self._hidden = step.hidden[: accepted + 1]
        return Verified(proposal.token_ids, accepted, token, step.logits)

    def follow(self, tokens: SequenceOf[int]) -> Calls[None]:
        """See `Rounds`."""
        assert self._hidden is not None
        yield from self.chain.observe(self._hidden, tokens)


@dataclass(frozen=True)
class AtOnce:
    """`Rounds` by the session's own.

    Attributes:
        sequence: The caches; no module is further behind than the session allows.
        modules: How many are kept fed.
    """

    sequence: Sequence
    modules: int

    def prepare(self, depth: int, tokens: SequenceOf[int]) -> Calls[None]:
        """See `Rounds`; the session feeds modules itself."""
        yield from ()

    def run(self, depth: int, tokens: SequenceOf[int]) -> Calls[Verified]:
        """See `Rounds`."""
        rows = self.sequence.length
        result = yield from round_of(RoundCall(self.sequence, tokens, depth, self.modules))
        if min(*result.drafts, *result.choices, 0) < 0:
            raise not_finite()
        drafts = tuple(result.drafts)
        accepted, token = verify_greedy(drafts, result.choices)
        if accepted < depth:
            self.sequence.truncate(self.sequence.length - (depth - accepted))
        take_back(self.sequence, rows, depth, accepted)
        return Verified(drafts, accepted, token, None)

    def follow(self, tokens: SequenceOf[int]) -> Calls[None]:
        """See `Rounds`; the session kept the rows."""
        yield from ()
