"""One sequence from prompt to finish: chunked prefill, then rounds of drafting and verification."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from step35_trt.errors import DoesNotFitError, UsageError
from step35_trt.runtime.depth import depth_policy, fixed_depth
from step35_trt.runtime.drafting import DraftChain, Proposal
from step35_trt.runtime.sampling import TargetRows, greedy, verify, verify_greedy, whole

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from collections.abc import Sequence as SequenceOf

    from step35_trt.runtime.depth import DraftTokens
    from step35_trt.runtime.sampling import SamplingParams
    from step35_trt.runtime.session import Floats, Ids, Sequence, Session, Step

    Clock = Callable[[], float]


@dataclass
class GenerationStats:
    """What a generation did; overwritten at its start, current after every round.

    Attributes:
        prompt_tokens: Length of the prompt.
        generated_tokens: Tokens given out; a stop id is not.
        rounds: Decoder calls after the prefill.
        drafted: Drafts of each MTP head.
        accepted: How many of them the decoder confirmed.
        prefill_seconds: Time to the first token, the MTP modules' share of the prompt included.
        decode_seconds: Time in rounds; what the caller does between them does not count.
        finish_reason: 'stop', 'length', or None as long as neither happened.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    rounds: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
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


@dataclass(frozen=True)
class DecoderCall:
    """What the decoder should run next: `Sequence.decode`'s arguments."""

    token_ids: Ids
    rows: Ids


class Generation:
    """The state of one generation, with the decoder calls left to the caller.

    `generate` makes them one at a time; a scheduler can gather the next calls of several generations into
    one. Each turn: `next_call`, run it on `sequence`, hand the result to `take`. The arguments are those of
    `generate`.

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
        self._chunk = session.prefill_chunk
        # Verifying K drafts takes K + 1 tokens in one call.
        depth = min(heads if fixed is None else fixed, self._chunk - 1)
        self._depth_limit = depth
        repeatable = sampling.seed is not None and not sampling.greedy
        self._policy = depth_policy(draft_tokens, depth, repeatable=repeatable)
        self.sequence: Sequence = session.open()
        self._chain = DraftChain(self.sequence, depth, self._chunk)
        self._proposal = Proposal()
        self._clock = clock
        self._call_started = self._round_started = 0.0
        self.stats = stats if stats is not None else GenerationStats()
        self.stats._begin(self._prompt_length, heads)

    @property
    def finished(self) -> bool:
        """Whether there is no further call to make."""
        return self.stats.finish_reason is not None

    @property
    def chain(self) -> DraftChain:
        """The MTP modules' side."""
        return self._chain

    def next_call(self) -> DecoderCall:
        """A chunk of the prompt, or the newest token and drafts of those after it; runs the MTP modules."""
        self._call_started = self._clock()
        done = self.sequence.length
        if done < self._prompt_length:
            ids = self._tokens[done : min(done + self._chunk, self._prompt_length)]
            last = done + len(ids) == self._prompt_length
            rows = np.array([len(ids) - 1] if last else [], dtype=np.int64)
            return DecoderCall(np.array(ids, dtype=np.int64), rows)
        left = self._limit - self.stats.generated_tokens
        depth = self._policy.choose(min(self._depth_limit, left - 1))
        self._chain.catch_up(depth, self._tokens)
        self._round_started = self._clock()  # a backlog is no part of what this depth costs
        self._proposal = self._chain.propose(depth, self._tokens, self._sampling, self._rng)
        ids = [self._tokens[-1], *self._proposal.token_ids]
        return DecoderCall(np.array(ids, dtype=np.int64), np.arange(len(ids)))

    def take(self, step: Step) -> list[int]:
        """Take the result of the call, which `sequence` already holds; returns the tokens now certain.

        Raises:
            VerificationError: the logits are not finite.
        """
        if len(self._tokens) == self._prompt_length:
            new = self._take_prompt(step)
            self.stats.prefill_seconds += self._clock() - self._call_started
        else:
            new = self._take_round(step)
            self.stats.decode_seconds += self._clock() - self._call_started
        return new

    def _take_prompt(self, step: Step) -> list[int]:
        new: list[int] = []
        if self.sequence.length == self._prompt_length:
            new = self._extend([self._verify(Proposal(), step.logits)[1]])
        if not self.finished:
            self._chain.observe(step.hidden, self._tokens)
            self._chain.catch_up(self._depth_limit, self._tokens)
        return new

    def _take_round(self, step: Step) -> list[int]:
        depth = len(self._proposal.token_ids)
        accepted, token = self._verify(self._proposal, step.logits)
        if accepted < depth:
            self.sequence.truncate(self.sequence.length - (depth - accepted))
        self._chain.settle(accepted)
        self._policy.record(depth, accepted, self._clock() - self._round_started)
        self.stats.rounds += 1
        for head in range(depth):
            self.stats.drafted[head] += 1
            self.stats.accepted[head] += head < accepted
        new = self._extend([*self._proposal.token_ids[:accepted], token])
        if not self.finished:
            self._chain.observe(step.hidden[: accepted + 1], self._tokens)
        return new

    def _verify(self, proposal: Proposal, logits: Floats) -> tuple[int, int]:
        if self._sampling.greedy:
            return verify_greedy(proposal.token_ids, greedy(logits))
        targets = TargetRows(logits, self._sampling)
        return verify(proposal.token_ids, proposal.weights, targets, self._rng)

    def _extend(self, new: list[int]) -> list[int]:
        """Append what the stop ids and the limit let pass."""
        stop = next((place for place, token in enumerate(new) if token in self._stop_ids), None)
        if stop is not None:
            new = new[:stop]
            self.stats.finish_reason = "stop"
        self._tokens += new
        self.stats.generated_tokens += len(new)
        if stop is None and self.stats.generated_tokens >= self._limit:
            self.stats.finish_reason = "length"
        return new


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
    generation = Generation(
        session,
        prompt_ids,
        sampling,
        max_tokens=max_tokens,
        stop_ids=stop_ids,
        draft_tokens=draft_tokens,
        stats=stats,
        clock=clock,
    )
    return _rounds(generation)


def _rounds(generation: Generation) -> Iterator[list[int]]:
    while not generation.finished:
        call = generation.next_call()
        new = generation.take(generation.sequence.decode(call.token_ids, call.rows))
        if new:
            yield new


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
