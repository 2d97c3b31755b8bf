"""Commands that make something of a checkpoint: bundles, quantised checkpoints, graphs."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

import rich_click as click

from step35_trt import console
from step35_trt.commands.parameters import PATH, shortened
from step35_trt.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from step35_trt.quantize.run import CalibrationOptions


class Bytes(click.ParamType[int]):
    """A number of bytes such as 500M or 12GiB; K, M, G and T are powers of 1000, with an i of 1024."""

    name = "bytes"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """See `click.ParamType`."""
        found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?) ?([KMGT]?)(i?)B?", str(value), re.IGNORECASE)
        if not found or float(found[1]) <= 0:
            self.fail(f"{shortened(str(value))} is not a number of bytes such as 500M or 12GiB", param, ctx)
        exponent = "KMGT".index(found[2].upper()) + 1 if found[2] else 0
        return int(float(found[1]) * (1024 if found[3] else 1000) ** exponent)


def calibration_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of a calibrated recipe, as one `CalibrationOptions`."""

    @click.option("--calibration", type=PATH, help="Text or JSONL; absent: its own.")
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


@click.command("build-engine")
@click.argument("checkpoint", required=False)
@click.option("-o", "--output", type=PATH, help="Directory of the bundle.")
@click.option("--engine", help="A shipped engine, or a YAML file.")
@click.option(
    "--recipe", help="Quantise the checkpoint by a recipe on the way: a shipped one, or a YAML file."
)
@click.option("--finish", "sealed", type=PATH, metavar="BUNDLE", help="Compile what a sealed bundle lacks.")
@calibration_options
def build_engine(
    checkpoint: str | None,
    output: Path | None,
    engine: str | None,
    recipe: str | None,
    sealed: Path | None,
    calibration: CalibrationOptions,
) -> None:
    """Build a bundle from CHECKPOINT: a directory, a hub id, or 'nano'. Resumes by itself.

    Where TensorRT compiles only on the GPU itself, the bundle is sealed without its segments: --finish
    BUNDLE, and nothing else, compiles them there.
    """
    others = checkpoint or output or engine or recipe or calibration.given
    if sealed is not None:
        if others:
            raise UsageError("--finish takes a bundle and nothing else")
        finish_sealed(sealed)
        return
    if checkpoint is None or output is None or engine is None:
        raise UsageError(
            "build-engine needs a checkpoint, --output and --engine",
            "step35-trt build-engine CHECKPOINT -o BUNDLE --engine NAME",
        )
    from step35_trt.build import build, build_quantized
    from step35_trt.bundle import finish_command
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
            made = build(source, output, spec, progress, console.say)
        else:
            job = Job.of(source, Recipe.load(recipe), calibration)
            made = build_quantized(job, output, spec, progress, console.say)
    console.say(f"{output} is {'ready' if made else 'there already, built from the same inputs'}")
    if spec.target == "tensorrt":
        console.say(f"its segments are compiled on the target: {finish_command(output)}")


def finish_sealed(bundle: Path) -> None:
    """Compile a sealed bundle's segments with the TensorRT here."""
    from step35_trt.finish import finish

    with console.item_progress("compiling segments") as progress:
        made = finish(bundle, progress)
    console.say(f"{bundle} is {'complete' if made else 'finished already'}")


@click.command()
@click.argument("checkpoint")
@click.option("-o", "--output", required=True, type=PATH, help="Directory of the new checkpoint.")
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


@click.command("export-onnx")
@click.argument("checkpoint")
@click.option("-o", "--output", required=True, type=PATH, help="Directory for graphs and weights.")
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
