"""The command for whole files of requests."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import rich_click as click

from step35_trt import console
from step35_trt.commands.parameters import AMOUNT, AT_ONCE, PATH, SHARE
from step35_trt.commands.parameters import draft_tokens as drafts_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Literal

    from step35_trt.runtime.batch_files.batch import BatchSummary


@click.command()
@click.argument("bundle", type=PATH)
@click.argument("requests", type=PATH)
@click.option("-o", "--output", required=True, type=PATH, help="Answers, JSON lines.")
@click.option(
    "--draft-tokens", default="auto", show_default=True, help="MTP drafts a round: 0 to 3, or auto."
)
@click.option("--sequences", default=16, show_default=True, type=AT_ONCE, help="Lines answered at a time.")
@click.option("--ray", metavar="ADDRESS", help="Spread over a Ray cluster: an address, auto, or local.")
@click.option("--workers", default=1, show_default=True, type=AT_ONCE, help="Of the cluster.")
@click.option("--worker-cpus", type=SHARE, help="Cores for each worker.")
@click.option("--price", type=AMOUNT, help="Of an hour of all machines together; adds the cost.")
@click.option("--json", "as_json", is_flag=True, help="The summary as a JSON object.")
def batch(
    bundle: Path,
    requests: Path,
    output: Path,
    draft_tokens: str,
    sequences: int,
    ray: str | None,
    workers: int,
    worker_cpus: float | None,
    price: float | None,
    as_json: bool,
) -> None:
    """Answer REQUESTS, a JSON-lines file in OpenAI's batch format. Resumes by itself."""
    from step35_trt.runtime.batch_files.batch_ray import RayOptions, run_batch_ray
    from step35_trt.runtime.placement import check_alone

    if ray is not None:
        check_alone("Ray starts the workers of a cluster itself")
    drafts = drafts_of(draft_tokens)
    with console.line_progress("answering", requests) as progress:

        def advance(summary: BatchSummary) -> None:
            progress(summary.lines, summary.errors)

        if ray is None:
            summary = _here(bundle, requests, output, sequences, drafts, advance)
        else:
            options = RayOptions(ray, workers, worker_cpus, sequences, drafts)
            summary = run_batch_ray(bundle, requests, output, options, progress=advance)
    cost = None if price is None else price * summary.seconds / 3600
    if as_json:
        figures = asdict(summary) | {"tokens_per_second": summary.tokens_per_second}
        console.print_json(figures if cost is None else figures | {"cost": cost})
    elif summary.already_finished:
        console.say(f"{output} was complete already: {summary.lines} lines")
    else:
        console.say(_told(output, summary, cost))


def _here(
    bundle: Path,
    requests: Path,
    output: Path,
    sequences: int,
    drafts: int | Literal["auto"],
    advance: Callable[[BatchSummary], None],
) -> BatchSummary:
    from step35_trt.runtime.batch_files.batch import run_batch
    from step35_trt.runtime.load import load_text, open_bundle

    session = open_bundle(bundle)
    text = load_text(bundle, required=True)
    assert text is not None
    return run_batch(
        session, text, requests, output, sequences=sequences, draft_tokens=drafts, progress=advance
    )


def _told(output: Path, summary: BatchSummary, cost: float | None) -> str:
    told = (
        f"{output}: {summary.answered} answers, {summary.errors} errors; "
        f"{summary.generated_now} tokens in {summary.seconds:.1f} s, {summary.tokens_per_second:.1f} tokens/s"
    )
    if cost is None:
        return told
    millions = summary.generated_now / 1e6
    return f"{told}; cost {cost:.4g}" + (f", {cost / millions:.4g} per million tokens" if millions else "")
