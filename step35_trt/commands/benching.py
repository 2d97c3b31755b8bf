"""`bench`: latency and throughput of a bundle under load."""

from __future__ import annotations

from typing import TYPE_CHECKING

import rich_click as click

from step35_trt import console
from step35_trt.commands import parameters
from step35_trt.commands.parameters import PATH
from step35_trt.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

REQUESTS_IN_FLIGHT = 4  # rounds of a run: enough that its start and end weigh little
MOST_IN_FLIGHT = 4096
WARM_UP = 8  # tokens


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--input-tokens", default=128, show_default=True, type=click.IntRange(min=1))
@click.option("--output-tokens", default=128, show_default=True, type=click.IntRange(min=1))
@click.option("--concurrency", default="1,8", show_default=True, help="Requests in flight, one run each.")
@click.option("--requests", type=click.IntRange(1, 1 << 20), help="Of a run; absent: 4 for each in flight.")
@click.option("--dataset", type=PATH, help="Prompts, a file as batch takes it; absent: random tokens.")
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the random tokens."
)
@click.option(
    "--draft-tokens", default="auto", show_default=True, help="MTP drafts a round: 0 to 3, or auto."
)
@click.option("--html", type=PATH, help="Write one self-contained page.")
@click.option("--json", "as_json", is_flag=True)
def bench(
    bundle: Path,
    input_tokens: int,
    output_tokens: int,
    concurrency: str,
    requests: int | None,
    dataset: Path | None,
    seed: int,
    draft_tokens: str,
    html: Path | None,
    as_json: bool,
) -> None:
    """Measure BUNDLE under load: tokens per second, time to first token, latencies, acceptance.

    Answers have exactly the tokens asked for: no stop token ends them.
    """
    from step35_trt.bench import load, report, workload
    from step35_trt.bench.figures import measure
    from step35_trt.bundle import Bundle
    from step35_trt.journal import replacing
    from step35_trt.pages.table import show
    from step35_trt.runtime.load import open_session

    flights, drafts = _flights(concurrency), parameters.draft_tokens(draft_tokens)
    opened = Bundle.open(bundle)
    session, spec = open_session(opened), opened.manifest.engine
    most = max(requests or REQUESTS_IN_FLIGHT * flight for flight in flights)
    if dataset is None:
        items = workload.synthetic(session, most, input_tokens, output_tokens, seed)
        asked = f"Random prompts of {input_tokens} tokens, answers of {output_tokens}"
    else:
        items = workload.of_prompts(session, _prompts(bundle, dataset, most), output_tokens)
        asked = f"Prompts of {dataset.name}, answers of at most {output_tokens} tokens"
    # The first calls load what the others find.
    load.run(session, workload.synthetic(session, 1, 1, WARM_UP, seed + 1), 1, drafts)
    runs = []
    with console.item_progress("answering") as progress:
        for flight in flights:
            wanted = items[: requests or REQUESTS_IN_FLIGHT * flight]
            done = load.run(session, wanted, flight, drafts, progress)
            runs.append(measure(done, opened.config, spec))
    if html is not None:
        with replacing(html) as stream:
            stream.write(report.render(runs, spec, asked + ".").encode())
        console.say(f"{html} is written")
    if as_json:
        console.print_json(report.as_json(runs, spec))
    else:
        console.out.print(f"{bundle}: {asked}", markup=False)
        show(report.tables(runs, spec))


def _flights(text: str) -> list[int]:
    flights = parameters.whole_numbers(text)
    if not flights or min(flights) < 1 or max(flights) > MOST_IN_FLIGHT:
        wanted = f"numbers up to {MOST_IN_FLIGHT} such as 1,8"
        raise UsageError(f"--concurrency takes {wanted}, not {parameters.shortened(text)}")
    return flights


def _prompts(bundle: Path, dataset: Path, most: int) -> list[list[int]]:
    """Token ids of the first requests of a batch file."""
    from itertools import islice

    from step35_trt.runtime.batch_files.batch_lines import opened, read_lines, request_of
    from step35_trt.runtime.dialogue.chat import ChatTemplate
    from step35_trt.runtime.dialogue.completions import parse_body, prompt_of
    from step35_trt.runtime.load import load_text

    text = load_text(bundle, required=True)
    assert text is not None
    template = None if text.chat_template is None else ChatTemplate.of(text)
    with opened(dataset) as source:
        lines = islice(read_lines(source, dataset), most)
        return [prompt_of(text, template, parse_body(request_of(line).body))[0] for line in lines]
