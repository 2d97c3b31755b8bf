"""Teacher-forced logits of a session, and how far two sessions are apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from step35_trt.runtime.session import Floats, Ids, Session


@dataclass(frozen=True)
class Evaluation:
    """Results for T given tokens.

    Attributes:
        logits: `[T, V]` fp32.
        hidden: `[T, D]` fp32, before the final norm.
        mtp_logits: `[k, T, V]` fp32: module k, row p; rows without a known next token are NaN.
    """

    logits: Floats
    hidden: Floats
    mtp_logits: Floats


@dataclass(frozen=True)
class Difference:
    """How `Evaluation`s compare, for the decoder or one MTP module.

    Attributes:
        name: 'decoder' or 'mtp-k'.
        relative_error: Largest logit difference over the largest reference logit.
        mean_kl: Mean over rows of KL(reference || other), nats.
        max_kl: Largest of them.
        top1: Share of rows with the same most likely token.
    """

    name: str
    relative_error: float
    mean_kl: float
    max_kl: float
    top1: float


def evaluate(session: Session, token_ids: Ids) -> Evaluation:
    """Run given tokens through the decoder and every MTP module, chained as in drafting (spec 3.2)."""
    config = session.config
    sequence = session.open()
    logits, hidden = [], []
    for start in range(0, len(token_ids), session.prefill_chunk):
        part = token_ids[start : start + session.prefill_chunk]
        step = sequence.decode(part, np.arange(len(part)))
        logits.append(step.logits)
        hidden.append(step.hidden)
    main = np.concatenate(hidden)
    count = config.num_nextn_predict_layers
    mtp = np.full((count, len(token_ids), config.vocab_size), np.nan, np.float32)
    carried = main
    for module in range(count):
        known = max(0, len(token_ids) - 1 - module)
        outputs = []
        for start in range(0, known, session.prefill_chunk):
            end = min(known, start + session.prefill_chunk)
            ids = token_ids[start + 1 + module : end + 1 + module]
            step = sequence.draft(module, ids, carried[start:end], np.arange(end - start))
            mtp[module, start:end] = step.logits
            outputs.append(step.hidden)
        carried = np.concatenate(outputs) if outputs else carried[:0]
    return Evaluation(np.concatenate(logits), main, mtp)


def differences(reference: Evaluation, other: Evaluation) -> list[Difference]:
    """Compare the decoder's logits and each module's."""
    pairs = [("decoder", reference.logits, other.logits)]
    for k in range(len(reference.mtp_logits)):
        rows = ~np.isnan(reference.mtp_logits[k]).any(-1)
        if rows.any():
            pairs.append((f"mtp-{k}", reference.mtp_logits[k][rows], other.mtp_logits[k][rows]))
    return [_difference(name, a, b) for name, a, b in pairs]


def _difference(name: str, reference: Floats, other: Floats) -> Difference:
    a, b = log_softmax(reference), log_softmax(other)
    kl = (np.exp(a) * (a - b)).sum(-1)
    return Difference(
        name,
        relative_error=float(np.abs(reference - other).max() / np.abs(reference).max()),
        mean_kl=float(kl.mean()),
        max_kl=float(kl.max()),
        top1=float((reference.argmax(-1) == other.argmax(-1)).mean()),
    )


def log_softmax(logits: Floats) -> Floats:
    """Log-probabilities over the last axis, in fp64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    result: Floats = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return result
