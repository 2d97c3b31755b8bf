"""A model small enough to know by heart, behind the session protocol, that checks what it is fed.

The decoder's next token depends on the last two tokens. A hidden row spells out which row it is: position,
token, a checksum over all rows of its cache up to itself, and who made it. A module can therefore tell a row
of the wrong position, of the wrong producer or made from a refused draft, and its own output differs for ever
after if a stale row stays in its cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from step35_trt.config import Step35Config
from step35_trt.runtime.packing import UNBOUNDED, check_context
from step35_trt.runtime.programs.round_plan import parts
from step35_trt.runtime.session import Call, Capacity, RoundResult, Step

if TYPE_CHECKING:
    from step35_trt.runtime.decoding.sampling import SamplingParams
    from step35_trt.runtime.session import RoundCall

WIDTH = 4  # of a hidden row: position, token, checksum, producer
DECODER = -1
QUERIES, SPAN = 4, 16  # of a round: rows of a sequence at a time, hidden rows that are kept


@dataclass(frozen=True)
class FakeModel:
    """Logits after (token before last, last token): the decoder's `[V, V, V]`, the heads' `[M, V, V, V]`."""

    decoder: Any
    heads: Any

    @classmethod
    def drawn(
        cls,
        seed: int,
        *,
        vocabulary: int = 8,
        modules: int = 3,
        noise: float = 0.5,
        levels: int | None = None,
    ) -> FakeModel:
        """Random tables; `noise` puts the heads off, `levels` makes the logits few, so that they tie."""
        rng = np.random.default_rng(seed)
        shape = (vocabulary,) * 3
        decoder, error = rng.normal(size=shape), rng.normal(size=(modules, *shape))
        heads = decoder + noise * error
        if levels is not None:
            decoder, heads = np.round(decoder * levels / 4), np.round(heads * levels / 4)
        return cls((1.5 * decoder).astype(np.float32), (1.5 * heads).astype(np.float32))

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """What a decoder alone would say."""
        tokens = [0, *prompt]
        for _ in range(count):
            row = self.decoder[tokens[-2], tokens[-1]].tolist()
            tokens.append(row.index(max(row)))
        return tokens[len(prompt) + 1 :]


@dataclass
class Cache:
    """Rows of the decoder or of a module: the token each took and the checksum it ended with."""

    tokens: list[int] = field(default_factory=list)
    sums: list[int] = field(default_factory=list)
    latest: int = 0  # first row of the latest call

    def extend(self, tokens: list[int], inputs: list[int]) -> None:
        self.latest = len(self.tokens)
        total = self.sums[-1] if self.sums else 0
        for token, entry in zip(tokens, inputs, strict=True):
            total = (total * 31 + token * 7 + entry * 3 + 1) % 65521
            self.sums.append(total)
        self.tokens += tokens

    def truncate(self, length: int) -> None:
        assert self.latest <= length <= len(self.tokens), "only rows of the latest call can be taken back"
        del self.tokens[length:], self.sums[length:]

    @property
    def content(self) -> tuple[list[int], list[int]]:
        return self.tokens, self.sums


@dataclass
class FakeClock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeSession:
    model: FakeModel
    max_tokens: int = 4096
    prefill_chunk: int = 512
    clock: FakeClock = field(default_factory=FakeClock)
    decode_seconds: float = 1.0  # a step
    token_seconds: float = 0.25  # each further token of it
    draft_seconds: float = 0.125  # a row of a module
    capacity: Capacity = UNBOUNDED
    checked: bool = True  # off where a test is about numbers only and long
    whole: bool = False  # whether it has rounds
    opened: list[FakeSequence] = field(default_factory=list)

    @property
    def config(self) -> Step35Config:
        heads, vocabulary = self.model.heads.shape[:2]
        partial: Any = Step35Config.model_construct  # a generation looks at these three
        config: Step35Config = partial(
            vocab_size=vocabulary, num_nextn_predict_layers=heads, hidden_size=WIDTH
        )
        return config

    def open(self, prompt_ids: Any = None, modules: int | None = None) -> FakeSequence:
        self.opened.append(FakeSequence(self))
        return self.opened[-1]

    def decode(self, calls: Any) -> list[Step]:
        check_context(calls, [call.sequence.length for call in calls], self.max_tokens)
        self._check_step(calls)
        self.clock.now += self.decode_seconds + self.token_seconds * (_tokens(calls) - 1)
        return [call.sequence.append(call.token_ids, call.rows) for call in calls]

    def draft(self, module: int, calls: Any) -> list[Step]:
        self._check_step(calls)
        self.clock.now += self.draft_seconds * _tokens(calls)
        return [call.sequence.append_draft(module, call.token_ids, call.hidden, call.rows) for call in calls]

    @property
    def rounds(self) -> FakeRounds | None:
        return FakeRounds(self) if self.whole else None

    def round(self, calls: Any) -> list[RoundResult]:
        verified = [Call(c.sequence, np.arange(c.depth + 1), np.arange(c.depth + 1)) for c in calls]
        check_context(verified, [call.sequence.length for call in calls], self.max_tokens)
        self._check_step(verified)
        self.clock.now += self.decode_seconds + self.token_seconds * (_tokens(verified) - 1)
        return [call.sequence.round(call) for call in calls]

    @property
    def longest_call(self) -> int:
        return max(self.prefill_chunk, QUERIES) if self.whole else self.prefill_chunk

    def _check_step(self, calls: Any) -> None:
        assert calls
        assert all(call.sequence.session is self for call in calls)
        assert not self.checked or _tokens(calls) <= self.prefill_chunk


@dataclass
class FakeRounds:
    session: FakeSession
    drafts: int = QUERIES - 1
    behind: int = 2 * QUERIES

    def round(self, calls: Any) -> list[RoundResult]:
        return self.session.round(calls)


def _tokens(calls: Any) -> int:
    return sum(len(call.token_ids) for call in calls)


class FakeSequence:
    def __init__(self, session: FakeSession) -> None:
        self.session = session
        self.decoder = Cache()
        self.modules = [Cache() for _ in session.model.heads]
        self.calls: list[tuple[int, int, int]] = []  # who ran, rows, rows whose logits were wanted
        self.held: dict[int, list[Any]] = {}  # hidden rows by who made them, as a device keeps them
        self.closed = False

    @property
    def length(self) -> int:
        return len(self.decoder.tokens)

    def decode(self, token_ids: Any, rows: Any) -> Step:
        return self.session.decode([Call(self, token_ids, rows)])[0]

    def append(self, token_ids: Any, rows: Any) -> Step:
        assert not self.closed
        first, tokens = self.length, token_ids.tolist()
        if self.session.checked:
            self._check_call(token_ids, rows)
            self._check_drafts(tokens)
        before = [self.decoder.tokens[-1] if first else 0, *tokens[:-1]]
        self.decoder.extend(tokens, [0] * len(tokens))
        self.calls.append((DECODER, len(tokens), len(rows)))
        logits = self.session.model.decoder[np.array(before)[rows], token_ids[rows]]
        return Step(logits, self._hidden(self.decoder, DECODER))

    def truncate(self, length: int) -> None:
        self.decoder.truncate(length)

    def draft_length(self, module: int) -> int:
        return len(self.modules[module].tokens)

    def draft(self, module: int, token_ids: Any, hidden: Any, rows: Any) -> Step:
        return self.session.draft(module, [Call(self, token_ids, rows, hidden)])[0]

    def append_draft(self, module: int, token_ids: Any, hidden: Any, rows: Any) -> Step:
        assert not self.closed
        # Of a hidden row: place, token, checksum, producer; exact in fp32.
        cache, tokens, inputs = self.modules[module], token_ids.tolist(), hidden.tolist()
        if self.session.checked:
            self._check_call(token_ids, rows)
            assert hidden.shape == (len(tokens), WIDTH)
            assert hidden.dtype == np.float32
            self._check_rows(module, tokens, inputs)
        cache.extend(tokens, [int(entry[2]) for entry in inputs])
        self.calls.append((module, len(tokens), len(rows)))
        before = np.array([entry[1] for entry in inputs], np.int64)
        return Step(
            self.session.model.heads[module][before[rows], token_ids[rows]], self._hidden(cache, module)
        )

    def close(self) -> None:
        self.closed = True

    def truncate_draft(self, module: int, length: int) -> None:
        self.modules[module].truncate(length)

    def round(self, call: RoundCall) -> RoundResult:
        """By the plan, each part on what the parts before have left."""
        assert call.sequence is self
        drafts: list[int] = []
        for module, part in ((part.graph - 1, part) for part in parts(call, QUERIES)):
            made = 0 if not len(part.rows) else call.depth if module < 0 else module
            assert min(part.token_ids) >= -made, "a draft that nobody has made yet"
            # As a device does with what is not finite.
            ids = np.array(part.filled([max(draft, 0) for draft in drafts]), np.int64)
            wanted = np.array(part.rows, np.int64)
            if part.graph == 0:
                assert part.past == self.length
                return RoundResult(drafts, _likeliest(self.append(ids, wanted).logits))
            assert part.past == self.draft_length(module)
            rows = range(part.past, part.past + len(ids))
            hidden = np.array([self.held[module - 1][row % SPAN] for row in rows])
            step = self.append_draft(module, ids, hidden, wanted)
            drafts += _likeliest(step.logits)
        raise AssertionError("a round ends with the decoder")

    def _check_call(self, token_ids: Any, rows: Any) -> None:
        assert token_ids.dtype == np.int64
        assert rows.dtype == np.int64
        assert token_ids.ndim == rows.ndim == 1
        assert 1 <= len(token_ids) <= self.session.longest_call
        assert all(0 <= row < len(token_ids) for row in rows.tolist())

    def _check_drafts(self, tokens: list[int]) -> None:
        """No module may still hold a row that took another token than the decoder takes now."""
        first = self.length
        for module, cache in enumerate(self.modules):
            for place, token in enumerate(tokens):
                row = first + place - 1 - module
                assert not 0 <= row < len(cache.tokens) or cache.tokens[row] == token, (
                    f"module {module} row {row} took {cache.tokens[row]}, token {first + place} is {token}"
                )

    def _check_rows(self, module: int, tokens: list[int], inputs: list[list[int]]) -> None:
        """Each row takes the token and the hidden row that specification 3.2 says, neither of them stale."""
        cache = self.modules[module]
        source = self.modules[module - 1] if module else self.decoder
        first = len(cache.tokens)
        for place, (position, token, total, producer) in enumerate(inputs):
            row = first + place
            assert producer == (module - 1 if module else DECODER)
            assert position == row, f"module {module} row {row} got the hidden row {position}"
            assert row < len(source.tokens), "the producer does not have this row"
            assert (token, total) == (source.tokens[row], source.sums[row]), (
                f"module {module} row {row} got a stale hidden row"
            )
            known = row + 1 + module
            assert known >= self.length or tokens[place] == self.decoder.tokens[known], (
                f"module {module} row {row} took {tokens[place]}, but token {known} is another"
            )

    def _hidden(self, cache: Cache, producer: int) -> Any:
        rows = range(cache.latest, len(cache.tokens))
        hidden = np.array([(p, cache.tokens[p], cache.sums[p], producer) for p in rows], dtype=np.float32)
        if not self.session.whole:
            return hidden
        ring = self.held.setdefault(producer, [None] * SPAN)
        for row, position in zip(hidden, rows, strict=True):
            ring[position % SPAN] = row
        return hidden


def _likeliest(logits: Any) -> list[int]:
    """By the book; -1 where a logit is not finite."""
    rows = [row.tolist() for row in logits]
    return [row.index(max(row)) if np.isfinite(row).all() else -1 for row in rows]


def fresh_caches(session: FakeSession, tokens: list[int], lengths: list[int]) -> FakeSequence:
    """A sequence that saw only true tokens: all but the newest of `tokens`, module k `lengths[k]` rows."""
    plain = FakeSession(session.model, max_tokens=len(tokens), prefill_chunk=len(tokens)).open()
    none = np.empty(0, dtype=np.int64)
    hidden = plain.decode(np.array(tokens[:-1], dtype=np.int64), none).hidden
    for module, length in enumerate(lengths):
        if not length:
            break
        ids = np.array(tokens[1 + module : 1 + module + length], dtype=np.int64)
        hidden = plain.draft(module, ids, hidden[:length], none).hidden
    return plain


def exact_probabilities(logits: Any, params: SamplingParams) -> list[float]:
    """The filters by the book, one row, in exact arithmetic after the exponential."""
    row = [float(x) for x in logits]
    if params.temperature == 0:
        return [float(i == row.index(max(row))) for i in range(len(row))]
    weights = [Fraction(math.exp((x - max(row)) / params.temperature)) for x in row]
    ranked = sorted(range(len(row)), key=lambda i: (-row[i], i))
    if params.top_k:
        ranked = ranked[: params.top_k]
    goal = Fraction(params.top_p) * sum(weights[i] for i in ranked)
    kept: list[int] = []
    for i in ranked:
        if kept and params.top_p < 1 and sum(weights[j] for j in kept) >= goal:
            break
        kept.append(i)
    kept = [i for i in kept if weights[i] >= Fraction(params.min_p) * weights[ranked[0]]]
    total = sum(weights[i] for i in kept)
    return [float(weights[i] / total) if i in kept else 0.0 for i in range(len(row))]


def chi_square(observed: Any, expected: Any) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom; cells expected fewer than 5 times are pooled."""
    assert not observed[expected == 0].any(), "a token of probability 0 was drawn"
    order = np.argsort(expected)
    observed, expected = observed[order], expected[order]
    small = max(int((expected.cumsum() < 5).sum()) + 1, int((expected < 5).sum()))
    observed = np.concatenate([[observed[:small].sum()], observed[small:]])
    expected = np.concatenate([[expected[:small].sum()], expected[small:]])
    if expected.size < 2:
        return 0.0, 0
    return float(((observed - expected) ** 2 / expected).sum()), expected.size - 1


class Scripted:
    """A depth policy that follows a list over and over."""

    def __init__(self, depths: list[int]) -> None:
        self.depths, self.round = depths, 0
        self.seconds: list[float] = []

    def choose(self, limit: int) -> int:
        return min(self.depths[self.round % len(self.depths)], limit)

    def record(self, depth: int, accepted: int, seconds: float) -> None:
        self.round += 1
        self.seconds.append(seconds)


def flat(parts: Any) -> list[int]:
    return [token for part in parts for token in part]
