"""What a benchmark asks for: prompts and how many tokens each answer has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from step35_trt.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from step35_trt.runtime.session import Session


@dataclass(frozen=True)
class Item:
    """One request: token ids, and exactly how many tokens are generated (no stop id ends an answer)."""

    prompt_ids: tuple[int, ...]
    output_tokens: int


def synthetic(session: Session, count: int, input_tokens: int, output_tokens: int, seed: int) -> list[Item]:
    """Prompts of random ids, no two with a common beginning, so that no cached prefix helps.

    Raises:
        UsageError: prompt and answer are longer than the bundle's context.
    """
    if input_tokens + output_tokens > session.max_tokens:
        raise UsageError(
            f"{input_tokens} and {output_tokens} tokens do not fit a context of {session.max_tokens}",
            "Ask for fewer input or output tokens.",
        )
    drawn = np.random.default_rng(seed).integers(session.config.vocab_size, size=(count, input_tokens))
    return [Item(tuple(row), output_tokens) for row in drawn.tolist()]


def of_prompts(session: Session, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[Item]:
    """Given prompts with answers of one length, shortened where the context ends.

    Raises:
        UsageError: there is none, or one leaves no room for an answer.
    """
    if not prompts:
        raise UsageError("the dataset holds no request")
    longest = max(map(len, prompts))
    if longest >= session.max_tokens:
        raise UsageError(f"a prompt of {longest} tokens leaves no room in a context of {session.max_tokens}")
    return [Item(tuple(ids), min(output_tokens, session.max_tokens - len(ids))) for ids in prompts]
