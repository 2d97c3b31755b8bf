"""Commands that say what something is: bundles, engines, this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click

from step35_trt import console
from step35_trt.commands.parameters import PATH, token_ids
from step35_trt.errors import CorruptInputError, DoesNotFitError, UsageError, VerificationError

if TYPE_CHECKING:
    from step35_trt.bundle import Bundle


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--reference", required=True, help="The checkpoint: a directory, a hub id, or 'nano'.")
@click.option("--ids", help="Token ids to compare on; absent: a text of the program's own.")
@click.option("--json", "as_json", is_flag=True)
def verify(bundle: Path, reference: str, ids: str | None, as_json: bool) -> None:
    """Compare a bundle with its checkpoint run by the torch oracle; a GPU bundle on the CPU, step by step."""
    from dataclasses import asdict

    from step35_trt.runtime.load import load_reference, resolve_checkpoint
    from step35_trt.verify import compare, compare_program

    directory, tokens = resolve_checkpoint(reference), token_ids(ids) if ids else None
    oracle = load_reference(directory)
    steps = compare_program(bundle, directory, tokens)
    if steps is not None:
        if as_json:
            console.print_json(steps.as_json())
        else:
            console.print_table(f"{bundle} against {reference}, {steps.tokens} tokens", *steps.table())
            console.say("run on the CPU: what was compiled for the GPU is not part of this")
        if steps.off:
            raise VerificationError(steps.off)
        return
    report = compare(bundle, oracle, tokens)
    if as_json:
        console.print_json(asdict(report))
    else:
        rows = [
            (d.name, f"{d.relative_error:.2e}", f"{d.mean_kl:.2e}", f"{d.max_kl:.2e}", f"{d.top1:.1%}")
            for d in report.differences
        ]
        columns = ("part", "relative error", "mean KL", "max KL", "same top token")
        console.print_table(f"{bundle} against {reference}, {report.tokens} tokens", columns, rows)
        console.say(f"limit of the recipe: mean KL {report.max_mean_kl:g} nats")
    if not report.passed:
        raise VerificationError(
            f"{report.worst} is further from the checkpoint than recipe {report.recipe} allows"
        )


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--check", is_flag=True, help="Read every byte and compare digests.")
@click.option("--tokens", default=1, show_default=True, type=click.IntRange(min=1), help="Of a GPU's call.")
@click.option("--context", type=click.IntRange(min=0), help="Positions cached before it; absent: 8192.")
@click.option("--html", type=PATH, help="Write one self-contained page, with the program drawn.")
@click.option("--json", "as_json", is_flag=True)
def inspect(
    bundle: Path, check: bool, tokens: int, context: int | None, html: Path | None, as_json: bool
) -> None:
    """Say what a bundle is: target, precision, steps and what they read."""
    from dataclasses import asdict

    from step35_trt.bundle import Bundle
    from step35_trt.inspection import contents, page
    from step35_trt.inspection.steps import CONTEXT, Row, drawing, rows, table
    from step35_trt.journal import replacing
    from step35_trt.pages.table import show
    from step35_trt.program import SteppedProgram

    opened = Bundle.open(bundle)
    if check:
        _check(opened)
    manifest, program, steps = opened.manifest, opened.program, list[Row]()
    cached = min(CONTEXT if context is None else context, manifest.max_tokens)
    if html is not None:
        with replacing(html) as stream:
            stream.write(page.render(opened, tokens, cached).encode())
        console.say(f"{html} is written")
    hardware = manifest.engine.hardware
    if isinstance(program, SteppedProgram) and hardware:
        steps = rows(program, hardware, tokens, cached)
    if as_json:
        whole = {"manifest": manifest.model_dump(), "program": program.model_dump(), "checked": check}
        console.print_json(whole | ({"steps": [asdict(step) for step in steps]} if steps else {}))
        return
    console.out.print(f"{manifest.engine.name}: {manifest.engine.summary}", markup=False)
    console.out.print(f"recipe {manifest.recipe.name}: {manifest.recipe.summary}", markup=False)
    console.out.print(contents.summary(opened))
    if isinstance(program, SteppedProgram):
        assert hardware is not None
        for line in drawing(steps, program):
            console.out.print(line, markup=False)
        show([table(steps, hardware, tokens, cached)])
    else:
        show([contents.graphs(program)])
    for note in manifest.notes:
        console.out.print(f"note: {note}", markup=False)
    if check:
        console.say("every file has the digest it was built with")


def _check(opened: Bundle) -> None:
    """Read every byte.

    Raises:
        CorruptInputError: a file is not what was built.
    """
    from step35_trt.bundle import rebuild

    with console.file_progress("checking") as progress:
        damaged = opened.damaged(progress)
    if damaged:
        others = f" and {len(damaged) - 1} other files have" if len(damaged) > 1 else " has"
        raise CorruptInputError(
            f"{damaged[0]}{others} changed since the bundle was built",
            rebuild(opened.directory, opened.manifest),
        )


@click.command()
@click.argument("checkpoint")
@click.option("--engine", required=True, help="A shipped engine, or a YAML file.")
@click.option("--acceptance", help="How often each MTP module is right, such as 0.85,0.75,0.65.")
@click.option("--html", type=PATH, help="Write one self-contained page.")
@click.option("--json", "as_json", is_flag=True)
def plan(checkpoint: str, engine: str, acceptance: str | None, html: Path | None, as_json: bool) -> None:
    """Say what an engine of CHECKPOINT would hold and how fast it could be; its config.json is enough."""
    from step35_trt.config import Step35Config
    from step35_trt.engine import EngineSpec
    from step35_trt.journal import replacing
    from step35_trt.plan import page, report, terminal
    from step35_trt.plan.plan import ACCEPTANCE, make_plan
    from step35_trt.runtime.load import resolve_checkpoint

    rates = ACCEPTANCE if acceptance is None else _rates(acceptance)
    path = Path(checkpoint)
    source = path if path.is_file() else resolve_checkpoint(checkpoint, ("config.json",))
    made = make_plan(Step35Config.load(source), EngineSpec.load(engine), rates)
    if html is not None:
        with replacing(html) as stream:
            stream.write(page.render(made, checkpoint).encode())
        console.say(f"{html} is written")
    if as_json:
        console.print_json(report.as_json(made))
    else:
        terminal.show(made)
    if not made.fits:
        instead = "; ".join(made.alternatives) or "no shipped engine holds these limits"
        raise DoesNotFitError(f"{engine}: {report.verdict(made)}", f"What fits: {instead}.")


@click.command()
@click.option("--json", "as_json", is_flag=True)
def doctor(as_json: bool) -> None:
    """Say what this machine can build for and run."""
    from step35_trt.doctor import examine

    findings = examine()
    if as_json:
        console.print_json([{"what": f.what, "found": f.found, "means": f.means} for f in findings])
    else:
        console.print_table(
            "machine", ("what", "found", "means"), [(f.what, f.found, f.means) for f in findings]
        )


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        rates = ()
    if not rates or not all(0 <= rate <= 1 for rate in rates):
        raise UsageError(f"--acceptance takes shares between 0 and 1 such as 0.85,0.75,0.65, not {text!r}")
    return rates
