"""What a generation did, in figures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


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
