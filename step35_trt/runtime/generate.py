"""One sequence from prompt to finish: chunked prefill, then rounds of drafting and verification."""

from __future__ import annotations

import time
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from step35_trt.errors import DoesNotFitError, UsageError
from step35_trt.runtime.calls import ModelCall, drive
from step35_trt.runtime.depth import depth_policy, fixed_depth
from step35_trt.runtime.drafting import DraftChain, Proposal
from step35_trt.runtime.sampling import (
    TargetRows,
    greedy,
    log_probability,
    verify,
    verify_greedy,
    whole,
    without_bad_words,
)
from step35_trt.runtime.session import Call

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from collections.abc import Sequence as SequenceOf

    from step35_trt.runtime.calls import Calls
    from step35_trt.runtime.depth import DraftTokens
    from step35_trt.runtime.sampling import SamplingParams
    from step35_trt.runtime.session import Floats, Ids, Sequence, Session

    Clock = Callable[[], float]


@dataclass
class GenerationStats:
    """What a generation did; overwritten at its start, current after every round.

    Attributes:
        prompt_tokens: Length of the prompt.
        reused_tokens: How many of them were found in the cache.
        generated_tokens: Tokens given out; a stop id is not.
        rounds: Decoder calls after the prefill.
        drafted: Drafts of each MTP head.
        accepted: How many of them the decoder confirmed.
        prefill_seconds: Time of the prompt's calls: to the first token, and the MTP modules' share.
        decode_seconds: Time in rounds; what the caller does between them does not count.
        log_probability: Sum over the answer's tokens of the model's own log-probabilities, before
            temperature, filters and bad words; 0 unless the sampling parameters ask for it.
        finish_reason: 'stop', 'length', or None as long as neither happened.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    rounds: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    log_probability: float = 0.0
    finish_reason: Literal["stop", "length"] | None = None

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the rounds (the first token is the prefill's) by their time; 0 without rounds."""
        return max(self.generated_tokens - 1, 0) / self.decode_seconds if self.decode_seconds > 0 else 0.0

    @property
    def acceptance(self) -> tuple[float, ...]:
        """Share of each head's drafts that the decoder confirmed, 0 for a head that drafted nothing."""
        return tuple(a / d if d else 0.0 for a, d in zip(self.accepted, self.drafted, strict=True))

    @property
    def mean_accepted_length(self) -> float:
        """Tokens that a round settled on average, the decoder's own included; 0 without rounds."""
        return 1 + sum(self.accepted) / self.rounds if self.rounds else 0.0

    def _begin(self, prompt_tokens: int, heads: int) -> None:
        vars(self).update(vars(GenerationStats(prompt_tokens, drafted=[0] * heads, accepted=[0] * heads)))


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
        self._certain: list[int] = []
        self._clock = clock
        self.stats = stats if stats is not None else GenerationStats()
        self.stats._begin(self._prompt_length, heads)

    @property
    def finished(self) -> bool:
        """Whether there is no further call to make."""
        return self.stats.finish_reason is not None

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
        sequence = self._session.open(np.array(self._tokens, dtype=np.int64), self._depth_limit)
        try:
            chain = DraftChain(sequence, self._depth_limit, self._chunk)
            yield from self._prefill(sequence, chain)
            while not self.finished:
                yield from self._round(sequence, chain)
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
            step = yield ModelCall(None, call, divisible=True)
            if sequence.length == end and not begun:
                self._extend([self._verify(Proposal(), step.logits)[1]], step.logits)
                if self.finished:
                    break
            yield from chain.observe(step.hidden, self._tokens)
            yield from chain.catch_up(self._depth_limit, self._tokens)
        self.stats.prefill_seconds += self._clock() - started

    def _round(self, sequence: Sequence, chain: DraftChain) -> Calls[None]:
        """Draft, verify, and undo what was refused."""
        started = self._clock()
        left = self._limit - self.stats.generated_tokens
        depth = self._policy.choose(min(self._depth_limit, left - 1))
        yield from chain.catch_up(depth, self._tokens)
        drafting = self._clock()  # a backlog is no part of what this depth costs
        proposal = yield from chain.propose(depth, self._tokens, self._sampling, self._rng)
        ids = np.array([self._tokens[-1], *proposal.token_ids], dtype=np.int64)
        step = yield ModelCall(None, Call(sequence, ids, np.arange(len(ids))))
        accepted, token = self._verify(proposal, step.logits)
        if accepted < depth:
            sequence.truncate(sequence.length - (depth - accepted))
        chain.settle(accepted)
        self._policy.record(depth, accepted, self._clock() - drafting)
        self.stats.rounds += 1
        for head in range(depth):
            self.stats.drafted[head] += 1
            self.stats.accepted[head] += head < accepted
        self._extend([*proposal.token_ids[:accepted], token], step.logits)
        if not self.finished:
            yield from chain.observe(step.hidden[: accepted + 1], self._tokens)
        self.stats.decode_seconds += self._clock() - started

    def _verify(self, proposal: Proposal, logits: Floats) -> tuple[int, int]:
        if bad_words := self._sampling.bad_words:
            logits = without_bad_words(logits, [*self._tokens, *proposal.token_ids], bad_words)
        if self._sampling.greedy:
            return verify_greedy(proposal.token_ids, greedy(logits))
        targets = TargetRows(logits, self._sampling)
        return verify(proposal.token_ids, proposal.weights, targets, self._rng)

    def _extend(self, new: list[int], logits: Floats) -> None:
        """Append what the stop ids and the limit let pass; row r of `logits` is what `new[r]` came from."""
        stop = next((place for place, token in enumerate(new) if token in self._stop_ids), None)
        if stop is not None:
            new = new[:stop]
            self.stats.finish_reason = "stop"
        if self._sampling.log_probabilities:
            self.stats.log_probability += log_probability(logits, new)
        self._tokens += new
        self._certain += new
        self._drawn = self._rng.bit_generator.state
        self.stats.generated_tokens += len(new)
        if stop is None and self.stats.generated_tokens >= self._limit:
            self.stats.finish_reason = "length"


def generate(
    session: Session,
    prompt_ids: SequenceOf[int] | Ids,
    sampling: SamplingParams,
    *,
    max_tokens: int,
    stop_ids: Collection[int] = (),
    draft_tokens: DraftTokens = "auto",
    stats: GenerationStats | None = None,
    clock: Clock = time.perf_counter,
) -> Iterator[list[int]]:
    """Complete a prompt, yielding the new token ids of each round as soon as they are certain.

    The arguments are checked by the call itself, before the first token is asked for. The iterator can be
    dropped or closed at any time; the session serves other sequences as before.

    Args:
        session: A loaded bundle.
        prompt_ids: Token ids, at least one.
        sampling: Filters and seed. A seed repeats the answer for the same `draft_tokens`; with 'auto' the
            depth then follows from acceptance and assumed costs, as measured ones differ from run to run.
        max_tokens: Tokens to generate at most; the context limit may end the answer earlier.
        stop_ids: Ids that end the answer; they are not given out.
        draft_tokens: Drafts per round, 0 .. number of MTP modules, fewer where a call takes too few tokens to
            verify them; 'auto' adapts, and a `DepthPolicy` goes on with what it learned in earlier calls
            (one at a time; seeded sampling ignores it). The answer's distribution (greedy: the answer) does
            not depend on it. With 0 the MTP modules never run.
        stats: Filled while running, if given.
        clock: Seconds, monotonic.

    Raises:
        UsageError: an argument is off.
        DoesNotFitError: the context has no room for the prompt and an answer.
        VerificationError: from the iterator, when the model's logits are not finite.
    """
    watch = _Stopwatch(clock)
    generation = Generation(
        session,
        prompt_ids,
        sampling,
        max_tokens=max_tokens,
        stop_ids=stop_ids,
        draft_tokens=draft_tokens,
        stats=stats,
        clock=watch,
    )
    return _parts(session, generation, watch)


def _parts(session: Session, generation: Generation, watch: _Stopwatch) -> Iterator[list[int]]:
    with closing(drive(session, generation.calls())) as steps:
        for _ in steps:
            if new := generation.take():
                with watch.stopped():
                    yield new


class _Stopwatch:
    """A clock that can be stopped: what the caller of an iterator does between two of its values."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lost = 0.0

    def __call__(self) -> float:
        return self._clock() - self._lost

    @contextmanager
    def stopped(self) -> Iterator[None]:
        at = self._clock()
        yield
        self._lost += self._clock() - at


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
