"""The state of one answer: chunked prefill, then rounds of drafting and verification."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from step35_trt.errors import DoesNotFitError, UsageError
from step35_trt.runtime.decoding.calls import ModelCall, step_of
from step35_trt.runtime.decoding.depth import depth_policy, fixed_depth
from step35_trt.runtime.decoding.drafting import DraftChain, Proposal
from step35_trt.runtime.decoding.generation_stats import GenerationStats
from step35_trt.runtime.decoding.rounds import AtOnce, CallByCall, choose, together
from step35_trt.runtime.decoding.sampling import log_probability, whole
from step35_trt.runtime.session import Call

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from collections.abc import Sequence as SequenceOf

    from step35_trt.runtime.decoding.calls import Calls
    from step35_trt.runtime.decoding.depth import DraftTokens
    from step35_trt.runtime.decoding.rounds import Rounds
    from step35_trt.runtime.decoding.sampling import SamplingParams
    from step35_trt.runtime.session import Floats, Ids, Sequence, Session

    Clock = Callable[[], float]


class Generation:
    """The state of one generation, with the model's calls left to the caller.

    `generate` makes them one at a time; a scheduler gathers those of several generations into packed steps.
    The arguments are those of `generate`.

    Raises:
        UsageError: from the constructor, naming the argument that is off.
        DoesNotFitError: from the constructor, when the context has no room for the prompt and an answer.
    """

    def __init__(
        self,
        session: Session,
        prompt_ids: SequenceOf[int] | Ids,
        sampling: SamplingParams,
        *,
        max_tokens: int,
        stop_ids: Collection[int] = (),
        draft_tokens: DraftTokens = "auto",
        stats: GenerationStats | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        heads = session.config.num_nextn_predict_layers
        fixed = fixed_depth(draft_tokens, heads)
        if not (whole(max_tokens) and max_tokens > 0):
            raise UsageError(f"max_tokens must be a whole number from 1 up, not {max_tokens!r}")
        self._tokens = _check_prompt(prompt_ids, session)
        self._prompt_length = len(self._tokens)
        self._limit = min(max_tokens, session.max_tokens - self._prompt_length)
        self._stop_ids = frozenset(stop_ids)
        self._sampling = sampling
        self._rng = sampling.generator()
        self._drawn = self._rng.bit_generator.state  # as of the newest certain token
        self._session = session
        self._chunk = session.prefill_chunk
        # Verifying K drafts takes K + 1 tokens in one call.
        self._depth_limit = min(heads if fixed is None else fixed, self._chunk - 1)
        repeatable = sampling.seed is not None and not sampling.greedy
        self._policy = depth_policy(draft_tokens, self._depth_limit, repeatable=repeatable)
        self._at_once = together(session, sampling)
        self._certain: list[int] = []
        self._clock = clock
        self.stats = stats if stats is not None else GenerationStats()
        self.stats._begin(self._prompt_length, heads)

    @property
    def finished(self) -> bool:
        """Whether there is no further call to make."""
        return self.stats.finish_reason is not None

    @property
    def at_once(self) -> bool:
        """Whether its rounds are run at once (`rounds.AtOnce`)."""
        return self._at_once

    @property
    def known_tokens(self) -> int:
        """Length of the prompt and the answer so far: its sequence needs one row less."""
        return len(self._tokens)

    @property
    def round_tokens(self) -> int:
        """Rows that a round adds at most."""
        return self._depth_limit + 1

    def take(self) -> list[int]:
        """The tokens that have become certain since the last time."""
        new, self._certain = self._certain, []
        return new

    def calls(self) -> Calls[None]:
        """The calls to make until `finished`, on a sequence that is opened first and closed at the end.

        The coroutine may be closed at any time; another one continues the answer, from a sequence of its own,
        as if there had been no interruption.

        Raises:
            DoesNotFitError: the session has no sequence to give.
            VerificationError: the logits are not finite.
        """
        self._rng.bit_generator.state = self._drawn
        # The newest token of a continued answer is not run before its first round, whose drafts begin with
        # a row that the modules have still to run.
        known = self._tokens[: len(self._tokens) - (self.stats.generated_tokens > 0)]
        sequence = self._session.open(np.array(known, dtype=np.int64), self._depth_limit)
        try:
            chain = DraftChain(sequence, self._depth_limit, self._chunk)
            yield from self._prefill(sequence, chain)
            rounds: Rounds = CallByCall(sequence, chain, self._sampling, self._rng)
            if self._at_once:
                rounds = AtOnce(sequence, self._depth_limit)
                del chain  # and the hidden rows in it
            while not self.finished:
                yield from self._round(rounds)
        finally:
            sequence.close()

    def _prefill(self, sequence: Sequence, chain: DraftChain) -> Calls[None]:
        """The prompt, in chunks; of a continued answer also what was said, save the newest token."""
        started = self._clock()
        begun = self.stats.generated_tokens > 0
        if not begun:
            self.stats.reused_tokens = sequence.length
        end = len(self._tokens) - begun
        while (done := sequence.length) < end:
            ids = self._tokens[done : min(done + self._chunk, end)]
            last = done + len(ids) == end and not begun
            rows = np.array([len(ids) - 1] if last else [], dtype=np.int64)
            call = Call(sequence, np.array(ids, dtype=np.int64), rows)
            step = yield from step_of(ModelCall(None, call, divisible=True))
            if sequence.length == end and not begun:
                chosen = choose(Proposal(), step.logits, self._tokens, self._sampling, self._rng)
                self._extend([chosen[1]], step.logits)
                if self.finished:
                    break
            yield from chain.observe(step.hidden, self._tokens)
            yield from chain.catch_up(self._depth_limit, self._tokens)
        self.stats.prefill_seconds += self._clock() - started

    def _round(self, rounds: Rounds) -> Calls[None]:
        """Draft, verify, and take in what stands."""
        started = self._clock()
        left = self._limit - self.stats.generated_tokens
        depth = self._policy.choose(min(self._depth_limit, left - 1))
        yield from rounds.prepare(depth, self._tokens)
        drafting = self._clock()
        found = yield from rounds.run(depth, self._tokens)
        self._policy.record(depth, found.accepted, self._clock() - drafting)
        self.stats.rounds += 1
        for head in range(depth):
            self.stats.drafted[head] += 1
            self.stats.accepted[head] += head < found.accepted
        self._extend([*found.drafts[: found.accepted], found.token], found.logits)
        if not self.finished:
            yield from rounds.follow(self._tokens)
        self.stats.decode_seconds += self._clock() - started

    def _extend(self, new: list[int], logits: Floats | None) -> None:
        """Append what the stop ids and the limit let pass; row r of `logits` is what `new[r]` came from."""
        stop = next((place for place, token in enumerate(new) if token in self._stop_ids), None)
        if stop is not None:
            new = new[:stop]
            self.stats.finish_reason = "stop"
        if self._sampling.log_probabilities:
            assert logits is not None
            self.stats.log_probability += log_probability(logits, new)
        self._tokens += new
        self._certain += new
        if not self._sampling.greedy:  # reading the state takes longer than all else here
            self._drawn = self._rng.bit_generator.state
        self.stats.generated_tokens += len(new)
        if stop is None and self.stats.generated_tokens >= self._limit:
            self.stats.finish_reason = "length"


def _check_prompt(prompt_ids: SequenceOf[int] | Ids, session: Session) -> list[int]:
    """The prompt as a list, checked against the vocabulary and the context."""
    ids = np.asarray(prompt_ids)
    if ids.size == 0:
        raise UsageError("The prompt is empty", "Give at least one token, for instance the BOS token.")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise UsageError("The prompt must be a flat list of whole token ids")
    vocabulary = session.config.vocab_size
    wrong = ids[(ids < 0) | (ids >= vocabulary)]
    if wrong.size:
        raise UsageError(f"Token id {wrong[0]} lies outside the vocabulary of {vocabulary} tokens")
    if ids.size >= session.max_tokens:
        raise DoesNotFitError(
            f"A prompt of {ids.size} tokens leaves no room to answer in a context of {session.max_tokens}",
            "Shorten the prompt or build the bundle with a longer context.",
        )
    tokens: list[int] = ids.tolist()
    return tokens
