"""Does a bundle compute what its checkpoint says?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from step35_trt.bundle import Bundle
from step35_trt.errors import UnsupportedError, UsageError
from step35_trt.evaluate import Difference, differences, evaluate
from step35_trt.runtime.load import load_text, open_session

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from step35_trt.runtime.session import Session

RANDOM_TOKENS = 96  # where there is no tokenizer: as many random ids

SAMPLE = """\
A compiler reads a description of a computation and writes another that a machine can execute. What it must
not do is change the answer. So the two are run side by side on a text such as this one, and the predictions
are compared word for word:

def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)
"""


@dataclass(frozen=True)
class Report:
    """The comparison on `tokens` tokens; `max_mean_kl` is the recipe's limit in nats."""

    recipe: str
    tokens: int
    max_mean_kl: float
    differences: tuple[Difference, ...]

    @property
    def worst(self) -> str:
        """The part that is furthest off."""
        return max(self.differences, key=lambda d: d.mean_kl).name

    @property
    def passed(self) -> bool:
        """Whether every part is within the limit; a NaN is not."""
        return all(d.mean_kl <= self.max_mean_kl for d in self.differences)


def compare(directory: Path, reference: Session, ids: Sequence[int] | None = None) -> Report:
    """Run the same tokens through a bundle and its reference.

    Raises:
        UsageError: an id lies outside the vocabulary.
        UnsupportedError: the bundle is of another model.
    """
    bundle = Bundle.open(directory)
    session = open_session(bundle)
    if not session.config.same_model(reference.config):
        raise UnsupportedError(f"{directory} was built from another model than the reference")
    if ids is None:
        text = load_text(directory, required=False)
        rng = np.random.default_rng(0)
        ids = (
            text.encode(SAMPLE)
            if text
            else rng.integers(0, session.config.vocab_size, RANDOM_TOKENS).tolist()
        )
    if not ids or not all(0 <= i < session.config.vocab_size for i in ids):
        raise UsageError(f"token ids must lie in the vocabulary of {session.config.vocab_size}")
    tokens = np.array(ids[: session.max_tokens])
    found = differences(evaluate(reference, tokens), evaluate(session, tokens))
    recipes = [r for r in (bundle.manifest.quantized, bundle.manifest.recipe) if r]
    limit = max(recipe.max_mean_kl for recipe in recipes)
    return Report(", ".join(recipe.name for recipe in recipes), len(tokens), limit, tuple(found))
