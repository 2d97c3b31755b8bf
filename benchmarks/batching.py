"""What batching brings: tokens/s of N requests at the same time against one after the other, in one run.

Both ways go through a scheduler, greedy, and take turns, so a change of the machine's speed meets both alike.
On nano the prompts are held-out text and drafting adapts; any other bundle (the slice of
`benchmarks/cpu_slice.py`) gets random prompts and drafts what its heads can. With `--document`, questions
about one long text follow: the first with an empty cache, the others with what it left there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from benchmarks.nano import prompts
from benchmarks.nano import session as nano_session
from step35_trt.runtime.scheduling.requests import Finished, Limits, TokenRequest, Tokens
from step35_trt.runtime.scheduling.scheduler import Scheduler

if TYPE_CHECKING:
    from collections.abc import Sequence

    from step35_trt.runtime.scheduling.requests import Event
    from step35_trt.runtime.session import Session


def serve(scheduler: Scheduler, requests: Sequence[TokenRequest]) -> dict[str, Any]:
    """Run requests that arrive together."""
    answers: list[list[int]] = [[] for _ in requests]
    ends: list[Finished] = []
    for request, answer in zip(requests, answers, strict=True):

        def sink(event: Event, answer: list[int] = answer) -> None:
            if isinstance(event, Tokens):
                answer += event.token_ids
            elif isinstance(event, Finished):
                ends.append(event)
            else:
                raise event.error

        scheduler.submit(request, sink)
    before = scheduler.metrics()
    started = time.perf_counter()
    while not scheduler.idle:
        scheduler.step()
    seconds = time.perf_counter() - started
    after = scheduler.metrics()
    # From admission: one behind the other, requests wait for reasons that are not the engine's.
    first = [e.first_token_seconds - e.queued_seconds for e in ends if e.first_token_seconds is not None]
    return {
        "answers": answers,
        "tokens_per_second": sum(map(len, answers)) / seconds,
        "first_token_ms": float(np.median(first)) * 1e3,
        "tokens_a_step": (after.step_tokens - before.step_tokens) / (after.steps - before.steps),
        "reused_tokens": after.reused_tokens - before.reused_tokens,
    }


def compare(session: Session, asked: Sequence[TokenRequest], repeats: int) -> dict[str, Any]:
    """One after the other against all at once.

    The first pair of runs warms up. Each way keeps its scheduler, which has by then learned what steps cost,
    as a server's has. The engine may reuse a prompt's pages from run to run in both ways alike.
    """
    alone, crowd = _scheduler(session, 1), _scheduler(session, len(asked))
    runs = [(serve(alone, asked), serve(crowd, asked)) for _ in range(repeats + 1)][1:]
    ratios = [together["tokens_per_second"] / single["tokens_per_second"] for single, together in runs]
    pairs = zip(runs[0][0]["answers"], runs[0][1]["answers"], strict=True)
    ways = {"one at a time": (alone, 0), "together": (crowd, 1)}
    return {
        "runs": {
            name: {
                "tokens_per_second": float(np.median([pair[way]["tokens_per_second"] for pair in runs])),
                "first_token_ms": float(np.median([pair[way]["first_token_ms"] for pair in runs])),
                "tokens_a_step": round(runs[-1][way]["tokens_a_step"], 2),
                "acceptance": scheduler.metrics().acceptance,
            }
            for name, (scheduler, way) in ways.items()
        },
        "ratio": float(np.median(ratios)),
        "ratios": ratios,
        "same_answers": sum(one == other for one, other in pairs),
    }


def _scheduler(session: Session, sequences: int) -> Scheduler:
    return Scheduler(session, Limits(sequences=sequences), clock=time.perf_counter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, help="instead of nano, built for --engine")
    parser.add_argument("--engine", default="cpu-int4")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--drafts", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--document", type=int, default=0, help="tokens of a beginning that all share")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    drafts: int | Literal["auto"] = "auto" if options.drafts == "auto" else int(options.drafts)
    with tempfile.TemporaryDirectory() as directory:
        session, texts = _open(options, Path(directory))
        asked = [TokenRequest(text, options.tokens, draft_tokens=drafts) for text in texts]
        result = compare(session, asked, options.repeats)
        if options.document:
            result["prefix"] = _prefix(session, options)
    if options.json:
        print(json.dumps(result))
        return
    print(f"{options.bundle or 'nano'}, {len(asked)} requests of {options.prompt} + {options.tokens} tokens")
    for name, run in result["runs"].items():
        shares = [round(share, 2) for share in run["acceptance"]]
        print(
            f"{name:>13}: {run['tokens_per_second']:7.1f} tokens/s, {run['tokens_a_step']} tokens a step, "
            f"first token {run['first_token_ms']:.1f} ms after admission, acceptance {shares}"
        )
    spread = f"{min(result['ratios']):.2f} to {max(result['ratios']):.2f}"
    print(f"ratio {result['ratio']:.2f} (median of {options.repeats}, {spread}); target 2")
    print(f"{result['same_answers']} of {len(asked)} answers are the same both ways")
    if options.document:
        cold, warm = result["prefix"]["cold"], result["prefix"]["warm"]
        print(
            f"a shared beginning of {options.document} tokens: first token {cold['first_token_ms']:.1f} ms, "
            f"then {warm['first_token_ms']:.1f} ms with {warm['reused_tokens']} tokens found in the cache"
        )


def _open(options: argparse.Namespace, directory: Path) -> tuple[Session, list[list[int]]]:
    if options.bundle is None:
        return nano_session(options.engine, directory), prompts(options.requests, options.prompt)
    from step35_trt.runtime.load import open_bundle

    session = open_bundle(options.bundle)
    rng = np.random.default_rng(0)
    shape = (options.requests, options.prompt)
    return session, rng.integers(0, session.config.vocab_size, shape).tolist()


def _prefix(session: Session, options: argparse.Namespace) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    vocabulary = session.config.vocab_size
    document = rng.integers(0, vocabulary, options.document).tolist()
    questions = rng.integers(0, vocabulary, (options.requests + 1, 16)).tolist()
    asked = [TokenRequest([*document, *question], 8) for question in questions]
    scheduler = _scheduler(session, 1)
    return {"cold": serve(scheduler, asked[:1]), "warm": serve(scheduler, asked[1:])}


if __name__ == "__main__":
    main()
