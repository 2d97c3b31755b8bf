"""The command line; thin. Back ends are imported by the command that needs them."""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import rich_click as click

from step35_trt import __version__, console
from step35_trt.errors import (
    CorruptInputError,
    DoesNotFitError,
    Step35Error,
    UnsupportedError,
    UsageError,
    VerificationError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from step35_trt.quantize.run import CalibrationOptions
    from step35_trt.runtime.batch import BatchSummary
    from step35_trt.runtime.generate import GenerationStats

CONTEXT = {"help_option_names": ["-h", "--help"], "token_normalize_func": lambda name: name.replace("_", "-")}
BUNDLE = click.Path(path_type=Path)
INTERRUPTED = 130  # what a shell reports for a program that SIGINT ended


def main() -> None:
    """Entry point: runs a command and turns expected failures into a sentence and an exit code."""
    try:
        cli.main(standalone_mode=False)
    except Step35Error as error:
        console.fail(error.message, error.hint)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(UsageError.exit_code)
    except (KeyboardInterrupt, click.Abort):
        console.fail(
            "interrupted",
            "build-engine, quantize and batch go on where they stopped when they are run again.",
        )
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        sys.exit(INTERRUPTED)
    except OSError as error:
        console.fail(f"{error.filename or 'output'}: {error.strerror or error}")
        sys.exit(UsageError.exit_code)


class Bytes(click.ParamType[int]):
    """A number of bytes such as 500M or 12GiB; K, M, G and T are powers of 1000, with an i of 1024."""

    name = "bytes"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """See `click.ParamType`."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?)B?", str(value), re.IGNORECASE)
        if not found or float(found[1]) <= 0:
            self.fail(f"{value!r} is not a number of bytes such as 500M or 12GiB", param, ctx)
        exponent = "KMGT".index(found[2].upper()) + 1 if found[2] else 0
        return int(float(found[1]) * (1024 if found[3] else 1000) ** exponent)


def calibration_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of a calibrated recipe, as one `CalibrationOptions`."""

    @click.option("--calibration", type=click.Path(path_type=Path), help="Text or JSONL; absent: its own.")
    @click.option("--min-expert-tokens", type=click.IntRange(min=0), help="Fewer: weight-only scales.")
    @click.option("--max-host-memory", type=Bytes(), help="For the calibration, such as 12GiB.")
    @functools.wraps(command)
    def wrapped(
        *arguments: object,
        calibration: Path | None,
        min_expert_tokens: int | None,
        max_host_memory: int | None,
        **others: object,
    ) -> None:
        from step35_trt.quantize.run import CalibrationOptions

        options = CalibrationOptions(calibration, min_expert_tokens, max_host_memory)
        command(*arguments, calibration=options, **others)

    return wrapped


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="step35-trt")
def cli() -> None:
    """Compile Step 3.5 Flash for a target and run it."""


@cli.command("build-engine")
@click.argument("checkpoint")
@click.option("-o", "--output", required=True, type=BUNDLE, help="Directory of the bundle.")
@click.option("--engine", required=True, help="A shipped engine, or a YAML file.")
@click.option(
    "--recipe", help="Quantise the checkpoint by a recipe on the way: a shipped one, or a YAML file."
)
@calibration_options
def build_engine(
    checkpoint: str, output: Path, engine: str, recipe: str | None, calibration: CalibrationOptions
) -> None:
    """Build a bundle from CHECKPOINT: a directory, a hub id, or 'nano'. Resumes by itself."""
    from step35_trt.build import build, build_quantized
    from step35_trt.engine import EngineSpec
    from step35_trt.quantize.recipe import Recipe
    from step35_trt.quantize.run import Job
    from step35_trt.runtime.load import resolve_checkpoint

    spec = EngineSpec.load(engine)
    source = resolve_checkpoint(checkpoint)
    if recipe is None and calibration.given:
        raise UsageError("calibration options need --recipe")
    with console.file_progress("building") as progress:
        if recipe is None:
            made = build(source, output, spec, progress)
        else:
            job = Job.of(source, Recipe.load(recipe), calibration)
            made = build_quantized(job, output, spec, progress)
    console.say(f"{output} is {'ready' if made else 'there already, built from the same inputs'}")


@cli.command()
@click.argument("checkpoint")
@click.option("-o", "--output", required=True, type=BUNDLE, help="Directory of the new checkpoint.")
@click.option("--recipe", required=True, help="A shipped recipe, or a YAML file.")
@calibration_options
@click.option("--evaluate", metavar="own|none|FILE", help="Held-out text; absent: own where calibrated.")
@click.option("--json", "as_json", is_flag=True)
def quantize(
    checkpoint: str,
    output: Path,
    recipe: str,
    calibration: CalibrationOptions,
    evaluate: str | None,
    as_json: bool,
) -> None:
    """Write CHECKPOINT in a recipe's precisions as an ordinary checkpoint, with a report. Resumes."""
    from step35_trt.quantize.recipe import Recipe
    from step35_trt.quantize.report import terminal
    from step35_trt.quantize.report.held_out import held_out
    from step35_trt.quantize.report.write import HTML, write_report
    from step35_trt.quantize.run import Job
    from step35_trt.runtime.load import resolve_checkpoint

    job = Job.of(resolve_checkpoint(checkpoint), Recipe.load(recipe), calibration)
    held = held_out(job, evaluate)
    with console.file_progress("quantising") as progress:
        made = job.run(output, progress)
        report = write_report(job, output, held, progress)
    if as_json:
        console.print_json(report.model_dump(mode="json"))
    else:
        terminal.show(report)
    console.say(f"{output} is {'ready' if made else 'there already, made from the same inputs'}")
    console.say(f"{output / HTML} has this with drawings")


@cli.command("export-onnx")
@click.argument("checkpoint")
@click.option("-o", "--output", required=True, type=BUNDLE, help="Directory for graphs and weights.")
@click.option("--ops", type=click.Choice(["standard", "ort"]), default="standard", show_default=True)
@click.option("--recipe", default="fp32", show_default=True, help="A shipped recipe, or a YAML file.")
def export_onnx(checkpoint: str, output: Path, ops: str, recipe: str) -> None:
    """Write the model as ONNX: plain opset 24, or with ONNX Runtime's contributed operators."""
    from step35_trt import build
    from step35_trt.dialects.onnx_ort import OrtSpelling
    from step35_trt.dialects.onnx_standard import StandardSpelling
    from step35_trt.quantize.recipe import Recipe
    from step35_trt.runtime.load import resolve_checkpoint

    chosen = Recipe.load(recipe)
    spelling = StandardSpelling() if ops == "standard" else OrtSpelling(chosen.activations == "int8")
    with console.file_progress("exporting") as progress:
        files = build.export_onnx(resolve_checkpoint(checkpoint), output, spelling, chosen, progress)
    console.say(f"{output} holds {', '.join(name for name in files if name.endswith('.onnx'))}")


@cli.command()
@click.argument("bundle", type=BUNDLE)
@click.option("--prompt", help="Text to continue.")
@click.option("--prompt-ids", help="Token ids to continue, separated by commas.")
@click.option("--max-tokens", default=128, show_default=True, type=click.IntRange(min=1))
@click.option("--temperature", default=0.0, show_default=True, help="0 takes the most likely token.")
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--top-k", default=0, show_default=True, help="0 keeps every token.")
@click.option("--min-p", default=0.0, show_default=True)
@click.option("--seed", type=int, help="Makes sampled output repeatable.")
@click.option("--stop", multiple=True, help="Text that ends the answer; may be given several times.")
@click.option(
    "--draft-tokens", default="auto", show_default=True, help="MTP drafts a round: 0 to 3, or auto."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a stream.")
def generate(
    bundle: Path,
    prompt: str | None,
    prompt_ids: str | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    seed: int | None,
    stop: tuple[str, ...],
    draft_tokens: str,
    as_json: bool,
) -> None:
    """Continue a prompt with a bundle, streaming text."""
    from step35_trt.runtime.generate import GenerationStats
    from step35_trt.runtime.generate import generate as run
    from step35_trt.runtime.load import load_text, open_bundle
    from step35_trt.runtime.sampling import SamplingParams
    from step35_trt.runtime.text import complete

    if (prompt is None) == (prompt_ids is None):
        raise UsageError("give either --prompt or --prompt-ids")
    sampling = SamplingParams(temperature, top_p, top_k, min_p, seed)
    drafts = _draft_tokens(draft_tokens)
    session = open_bundle(bundle)
    text = load_text(bundle, required=prompt is not None)
    ids = text.encode(prompt) if prompt is not None and text else _ids(prompt_ids or "")
    stats, taken, answer = GenerationStats(), list[int](), list[str]()
    stop_ids = session.config.eos_token_id
    if text is None:
        for chunk in run(
            session, ids, sampling, max_tokens=max_tokens, stop_ids=stop_ids, draft_tokens=drafts, stats=stats
        ):
            taken += chunk
    else:
        for piece in complete(
            session,
            text,
            ids,
            sampling,
            max_tokens=max_tokens,
            stop_ids=stop_ids,
            stop_strings=stop,
            draft_tokens=drafts,
            stats=stats,
            token_ids=taken,
        ):
            answer.append(piece)
            if not as_json:
                sys.stdout.write(piece)
                sys.stdout.flush()
    if as_json:
        result = {"text": "".join(answer) if text else None, "token_ids": taken}
        console.print_json(result | {"finish_reason": stats.finish_reason, "stats": _summary(stats)})
        return
    sys.stdout.write("\n" if text else ",".join(map(str, taken)) + "\n")
    acceptance = ", ".join(f"{share:.0%}" for share in stats.acceptance)
    console.say(
        f"{stats.generated_tokens} tokens, {stats.tokens_per_second:.1f} tokens/s; "
        f"mean accepted length {stats.mean_accepted_length:.2f}"
        + (f"; acceptance by head {acceptance}" if acceptance else "")
    )


@cli.command()
@click.argument("bundle", type=BUNDLE)
@click.argument("requests", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Answers, JSON lines.")
@click.option(
    "--draft-tokens", default="auto", show_default=True, help="MTP drafts a round: 0 to 3, or auto."
)
@click.option("--json", "as_json", is_flag=True, help="The summary as a JSON object.")
def batch(bundle: Path, requests: Path, output: Path, draft_tokens: str, as_json: bool) -> None:
    """Answer REQUESTS, a JSON-lines file in OpenAI's batch format. Resumes by itself."""
    from dataclasses import asdict

    from step35_trt.runtime.batch import run_batch
    from step35_trt.runtime.load import load_text, open_bundle

    drafts = _draft_tokens(draft_tokens)
    session = open_bundle(bundle)
    text = load_text(bundle, required=True)
    assert text is not None
    with console.line_progress("answering", requests) as progress:

        def advance(summary: BatchSummary) -> None:
            progress(summary.lines, summary.errors)

        summary = run_batch(session, text, requests, output, draft_tokens=drafts, progress=advance)
    if as_json:
        console.print_json(asdict(summary))
    elif summary.already_finished:
        console.say(f"{output} was complete already: {summary.lines} lines")
    else:
        console.say(
            f"{output}: {summary.answered} answers, {summary.errors} errors, "
            f"{summary.generated_tokens} tokens in {summary.seconds:.1f} s"
        )


@cli.command()
@click.argument("model")
@click.option("--ids", required=True, help="Token ids, separated by commas.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="An .npz file.")
def logits(model: str, ids: str, output: Path) -> None:
    """Write logits, hidden states and MTP logits of given tokens; MODEL is a bundle or a checkpoint."""
    import numpy as np

    from step35_trt.evaluate import evaluate
    from step35_trt.journal import replacing
    from step35_trt.runtime.load import load_any

    session = load_any(model)
    result = evaluate(session, np.array(_checked(_ids(ids), session.config.vocab_size)))
    with replacing(output) as stream:
        np.savez(stream, logits=result.logits, hidden=result.hidden, mtp_logits=result.mtp_logits)
    console.say(f"{output}: {len(result.logits)} tokens")


@cli.command()
@click.argument("bundle", type=BUNDLE)
@click.option("--reference", required=True, help="The checkpoint: a directory, a hub id, or 'nano'.")
@click.option("--ids", help="Token ids to compare on; absent: a text of the program's own.")
@click.option("--json", "as_json", is_flag=True)
def verify(bundle: Path, reference: str, ids: str | None, as_json: bool) -> None:
    """Compare a bundle with its checkpoint run by the torch oracle; a GPU bundle on the CPU, step by step."""
    from dataclasses import asdict

    from step35_trt.runtime.load import load_reference, resolve_checkpoint
    from step35_trt.verify import compare, compare_program

    directory, tokens = resolve_checkpoint(reference), _ids(ids) if ids else None
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


@cli.command()
@click.argument("bundle", type=BUNDLE)
@click.option("--check", is_flag=True, help="Read every byte and compare digests.")
@click.option("--tokens", default=1, show_default=True, type=click.IntRange(min=1), help="Of a GPU's call.")
@click.option("--context", type=click.IntRange(min=0), help="Positions cached before it; absent: 8192.")
@click.option("--json", "as_json", is_flag=True)
def inspect(bundle: Path, check: bool, tokens: int, context: int | None, as_json: bool) -> None:
    """Say what a bundle is: target, precision, steps and what they read."""
    from dataclasses import asdict

    from step35_trt import inspection
    from step35_trt.bundle import Bundle
    from step35_trt.pages.table import show
    from step35_trt.program import SteppedProgram

    opened = Bundle.open(bundle)
    if check:
        damaged = opened.damaged()
        if damaged:
            raise CorruptInputError(f"{damaged[0]} has changed since the bundle was built", "Build it again.")
    manifest, program, steps = opened.manifest, opened.program, list[inspection.Row]()
    cached = min(inspection.CONTEXT if context is None else context, manifest.max_tokens)
    hardware = manifest.engine.hardware
    if isinstance(program, SteppedProgram) and hardware:
        steps = inspection.rows(program, hardware, tokens, cached)
    if as_json:
        whole = {"manifest": manifest.model_dump(), "program": program.model_dump(), "checked": check}
        console.print_json(whole | ({"steps": [asdict(step) for step in steps]} if steps else {}))
        return
    console.out.print(f"{manifest.engine.name}: {manifest.engine.summary}", markup=False)
    console.out.print(f"recipe {manifest.recipe.name}: {manifest.recipe.summary}", markup=False)
    size = sum(record.size for record in manifest.files.values())
    console.out.print(f"{len(manifest.files)} files, {size / 1e6:.1f} MB; up to {manifest.max_tokens} tokens")
    if isinstance(program, SteppedProgram):
        assert hardware is not None
        for line in inspection.drawing(steps, program):
            console.out.print(line, markup=False)
        show([inspection.table(steps, hardware, tokens, cached)])
    else:
        rows = []
        for s in (segment for segments in (program.decoder, *program.mtp) for segment in segments):
            window = sum(cache.window > 0 for cache in s.caches)
            per_token = sum(cache.row_bytes for cache in s.caches if not cache.window)
            caches = f"{len(s.caches) - window} full, {window} window"
            rows.append(
                (s.file, s.backend, caches, f"{s.bytes_per_token / 1e6:.1f}", f"{per_token / 1e3:.1f}")
            )
        columns = ("step", "back end", "caches", "MB read a token", "KV kB a token")
        console.print_table("program", columns, rows)
    for note in manifest.notes:
        console.out.print(f"note: {note}", markup=False)
    if check:
        console.say("every file has the digest it was built with")


@cli.command()
@click.option("--target", required=True, help="A GPU's compute capability, such as sm_90 or sm_121.")
@click.option("--checkpoint", help="Whose geometry; absent: the published model's.")
@click.option("-o", "--output", type=BUNDLE, help="Directory for PTX, machine code and launch metadata.")
@click.option("--json", "as_json", is_flag=True)
def kernels(target: str, checkpoint: str | None, output: Path | None, as_json: bool) -> None:
    """Compile the GPU kernels for a target, without needing one, and check what they take on the chip."""
    from dataclasses import asdict

    from step35_trt.config import Step35Config
    from step35_trt.kernels.catalogue import deployment
    from step35_trt.kernels.compile import compile_kernels
    from step35_trt.kernels.report import report
    from step35_trt.kernels.targets import gpu_target
    from step35_trt.resources import PUBLISHED
    from step35_trt.runtime.load import resolve_checkpoint

    gpu = gpu_target(target)
    config = Step35Config.load(resolve_checkpoint(checkpoint) if checkpoint else PUBLISHED)
    with console.item_progress("compiling") as progress:
        compiled = compile_kernels(deployment(config, gpu), gpu, progress=progress)
    reports = [report(kernel) for kernel in compiled]
    if output is not None:
        for kernel in compiled:
            kernel.save(output / kernel.variant.plugin, kernel.variant.name)
    if as_json:
        console.print_json([asdict(item) for item in reports])
    else:
        rows = [
            (
                item.kernel,
                item.num_warps,
                item.registers,
                item.spill_bytes,
                item.shared_bytes,
                ", ".join(f"{count} {kind}" for kind, count in item.instructions.items()),
                "; ".join(item.failures) or "passed",
            )
            for item in reports
        ]
        columns = ("kernel", "warps", "registers", "spilled B", "shared B", "instructions", "check")
        console.print_table(f"{gpu.name}, {gpu.summary}: {gpu.shared_bytes} B shared a block", columns, rows)
    failed = [item for item in reports if item.failures]
    if failed:
        raise VerificationError(
            f"{len(failed)} of {len(reports)} kernels fail their check: "
            f"{failed[0].kernel} {failed[0].failures[0]}"
        )


@cli.command()
@click.argument("checkpoint")
@click.option("--engine", required=True, help="A shipped engine, or a YAML file.")
@click.option("--acceptance", help="How often each MTP module is right, such as 0.85,0.75,0.65.")
@click.option("--html", type=click.Path(path_type=Path), help="Write one self-contained page.")
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


@cli.command()
@click.option("--plugin", help="Only this plugin's kernels.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where its tactics go.")
def tune(plugin: str | None, output: Path | None) -> None:
    """Measure tilings of the GPU kernels on the GPU that is here and write its tactics files."""
    from step35_trt.kernels.catalogue import PLUGINS
    from step35_trt.kernels.plugin import ROOT

    if plugin is not None and plugin not in PLUGINS:
        raise UsageError(f"there is no plugin {plugin}", f"Known: {', '.join(PLUGINS)}.")
    if output is not None and plugin is None:
        raise UsageError("--output takes the tactics of one plugin", "Name it with --plugin.")
    try:
        import torch
    except ModuleNotFoundError:
        raise UnsupportedError("tuning needs PyTorch", "pip install 'step35-trt[cuda,kernels]'") from None

    from step35_trt.dialects.torch_kernels import present_target
    from step35_trt.journal import replacing
    from step35_trt.kernels.gpu_bench import tuned
    from step35_trt.kernels.tuning import text

    device = torch.device("cuda")
    target = present_target(device)
    for name in [plugin] if plugin else PLUGINS:
        with console.item_progress(f"tuning {name}") as progress:
            found = tuned(name, target, device, progress)
        path = output or ROOT / name / "tactics" / f"{target.name}.json"
        with replacing(path) as stream:
            stream.write(text(found).encode())
        console.say(f"{path}: {found.measured}")


@cli.command()
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


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{text!r} is not a list of token ids such as 1,2,3") from None


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        rates = ()
    if not rates or not all(0 <= rate <= 1 for rate in rates):
        raise UsageError(f"--acceptance takes shares between 0 and 1 such as 0.85,0.75,0.65, not {text!r}")
    return rates


def _checked(ids: list[int], vocabulary: int) -> list[int]:
    for token in ids:
        if not 0 <= token < vocabulary:
            raise UsageError(f"token id {token} lies outside the vocabulary of {vocabulary}")
    return ids


def _draft_tokens(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not text.isdecimal():
        raise UsageError(f"--draft-tokens takes 0, 1, 2, 3 or auto, not {text!r}")
    return int(text)


def _summary(stats: GenerationStats) -> dict[str, object]:
    return {
        "prompt_tokens": stats.prompt_tokens,
        "generated_tokens": stats.generated_tokens,
        "rounds": stats.rounds,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "acceptance": list(stats.acceptance),
        "mean_accepted_length": stats.mean_accepted_length,
        "prefill_seconds": stats.prefill_seconds,
        "decode_seconds": stats.decode_seconds,
        "tokens_per_second": stats.tokens_per_second,
    }
