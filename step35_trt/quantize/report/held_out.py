"""Text that a conversion is judged by, which its calibration has not seen."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from step35_trt.errors import UsageError
from step35_trt.nano.corpus import held_out_text
from step35_trt.quantize.calibration.texts import calibration_tokens

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from step35_trt.quantize.run import Job

TOKENS, LENGTH = 8192, 512
WINDOW = 32  # tokens; so many in a row are no coincidence
MOST_SHARED = 0.1


@dataclass(frozen=True)
class HeldOut:
    """Sequences `[n, length]`, where they come from, and the share of them that calibration saw."""

    name: str
    token_ids: NDArray[np.int64]
    in_calibration: float | None

    @property
    def digest(self) -> str:
        """Tells this text from another."""
        return hashlib.blake2b(self.token_ids.tobytes() + str(self.token_ids.shape).encode()).hexdigest()


def held_out(job: Job, choice: str | None) -> HeldOut | None:
    """The text to judge a conversion by.

    Args:
        job: The conversion.
        choice: A file as `calibration_tokens` takes it, `own` for documents that neither nano's training nor
            a calibration without a file has seen, `none`; None: `own` where the recipe is calibrated.

    Raises:
        UsageError: there is no tokenizer, the file has no text, or calibration has seen it.
    """
    unasked = "none" if job.token_ids is None else "own"
    chosen = unasked if choice is None else choice
    if chosen == "none":
        return None
    from step35_trt.runtime.dialogue.text import Text

    source = job.source
    if not (source.directory / "tokenizer.json").is_file():
        raise UsageError(
            f"{source.directory} has no tokenizer.json, which held-out text needs",
            "Put the model's tokenizer beside its weights, or leave --evaluate out.",
        )
    own = (held_out_text(),) if chosen == "own" else None
    file = None if own else Path(chosen)
    length = min(LENGTH, source.config.max_position_embeddings)
    ids = calibration_tokens(Text.load(source.directory), file, TOKENS, length, own)
    least = 2 + source.config.num_nextn_predict_layers
    if ids.shape[1] < least:
        raise UsageError(f"{chosen} has {ids.shape[1]} tokens, too few to judge by", f"Give {least} or more.")
    shared = None if job.token_ids is None else shared_windows(ids, job.token_ids)
    if shared is not None and shared > MOST_SHARED:
        raise UsageError(
            f"{shared:.0%} of the held-out text {chosen} is in the calibration text",
            "A model is judged by text that it was not fitted to; give another with --evaluate.",
        )
    name = "documents kept back from nano's training" if own else Path(chosen).name
    return HeldOut(name, ids, shared)


def shared_windows(ids: NDArray[np.int64], others: NDArray[np.int64]) -> float:
    """Share of the windows of `WINDOW` tokens of `ids [n, length]` that occur in `others [m, length]`."""
    return float(np.isin(_windows(ids), _windows(others)).mean())


def _windows(ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A fingerprint of each window: a random linear combination modulo 2^64."""
    width = min(WINDOW, ids.shape[1])
    factors = np.random.default_rng(0).integers(1, 1 << 63, WINDOW, dtype=np.uint64)[:width] | np.uint64(1)
    views = np.lib.stride_tricks.sliding_window_view(ids.astype(np.uint64), width, axis=1)
    prints: NDArray[np.uint64] = (views * factors).sum(-1, dtype=np.uint64).ravel()
    return prints
