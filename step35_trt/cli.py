"""The command line; thin. Back ends are imported by the command that needs them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import rich_click as click

from step35_trt import __version__, console
from step35_trt.errors import CorruptInputError, Step35Error, UsageError, VerificationError

if TYPE_CHECKING:
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
            "interrupted", "build-engine and batch go on where they stopped when they are run again."
        )
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        sys.exit(INTERRUPTED)
    except OSError as error:
        console.fail(f"{error.filename or 'output'}: {error.strerror or error}")
        sys.exit(UsageError.exit_code)


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="step35-trt")
def cli() -> None:
    """Compile Step 3.5 Flash for a target and run it."""


@cli.command("build-engine")
@click.argument("checkpoint")
@click.option("-o", "--output", required=True, type=BUNDLE, help="Directory of the bundle.")
@click.option("--engine", required=True, help="A shipped engine, or a YAML file.")
def build_engine(checkpoint: str, output: Path, engine: str) -> None:
    """Build a bundle from CHECKPOINT: a directory, a hub id, or 'nano'. Resumes by itself."""
    from step35_trt.build import build
    from step35_trt.engine import EngineSpec
    from step35_trt.runtime.load import resolve_checkpoint

    spec = EngineSpec.load(engine)
    source = resolve_checkpoint(checkpoint)
    with console.file_progress("building") as progress:
        made = build(source, output, spec, progress)
    console.say(f"{output} is {'ready' if made else 'there already, built from the same inputs'}")


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
    """Compare a bundle with its checkpoint run in fp32 by the torch oracle."""
    from dataclasses import asdict

    from step35_trt.runtime.load import load_reference, resolve_checkpoint
    from step35_trt.verify import compare

    directory = resolve_checkpoint(reference)
    report = compare(bundle, load_reference(directory), _ids(ids) if ids else None)
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
@click.option("--json", "as_json", is_flag=True)
def inspect(bundle: Path, check: bool, as_json: bool) -> None:
    """Say what a bundle is: target, precision, steps and what they read."""
    from step35_trt.bundle import Bundle

    opened = Bundle.open(bundle)
    if check:
        damaged = opened.damaged()
        if damaged:
            raise CorruptInputError(f"{damaged[0]} has changed since the bundle was built", "Build it again.")
    if as_json:
        program = opened.program.model_dump()
        console.print_json({"manifest": opened.manifest.model_dump(), "program": program, "checked": check})
        return
    manifest = opened.manifest
    console.out.print(f"{manifest.engine.name}: {manifest.engine.summary}", markup=False)
    console.out.print(f"recipe {manifest.recipe.name}: {manifest.recipe.summary}", markup=False)
    size = sum(record.size for record in manifest.files.values())
    console.out.print(f"{len(manifest.files)} files, {size / 1e6:.1f} MB; up to {manifest.max_tokens} tokens")
    rows = []
    for segments in (opened.program.decoder, *opened.program.mtp):
        for s in segments:
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
