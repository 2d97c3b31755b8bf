"""Commands about the GPU kernels: compiling, tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

import rich_click as click

from step35_trt import console
from step35_trt.commands.parameters import PATH
from step35_trt.errors import UnsupportedError, UsageError, VerificationError

if TYPE_CHECKING:
    from pathlib import Path

    from step35_trt.kernels.tactics import Tactics


@click.command()
@click.option("--target", required=True, help="A GPU's compute capability, such as sm_90 or sm_121.")
@click.option("--checkpoint", help="Whose geometry; absent: the published model's.")
@click.option("-o", "--output", type=PATH, help="Directory for PTX, machine code and launch metadata.")
@click.option("--json", "as_json", is_flag=True)
def kernels(target: str, checkpoint: str | None, output: Path | None, as_json: bool) -> None:
    """Compile the GPU kernels for a target, without needing one, and check what they take on the chip."""
    from dataclasses import asdict

    from step35_trt.config import Step35Config
    from step35_trt.kernels import catalogue
    from step35_trt.kernels.compile import compile_kernels
    from step35_trt.kernels.report import report
    from step35_trt.kernels.targets import gpu_target
    from step35_trt.resources import PUBLISHED
    from step35_trt.runtime.load import resolve_checkpoint

    gpu = gpu_target(target)
    config = Step35Config.load(resolve_checkpoint(checkpoint) if checkpoint else PUBLISHED)
    with console.item_progress("compiling") as progress:
        compiled = compile_kernels(catalogue.every(config, gpu), gpu, progress=progress)
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


@click.command()
@click.option("--plugin", help="Only this plugin's kernels.")
@click.option("-o", "--output", type=PATH, help="Where its tactics go.")
def tune(plugin: str | None, output: Path | None) -> None:
    """Measure tilings of the GPU kernels on the GPU that is here and write its tactics files.

    Each improvement is written at once, so the command may be interrupted.
    """
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
        path = output or ROOT / name / "tactics" / f"{target.name}.json"

        def keep(found: Tactics, path: Path = path) -> None:
            with replacing(path) as stream:
                stream.write(text(found).encode())

        with console.item_progress(f"tuning {name}") as progress:
            found = tuned(name, target, device, progress, keep)
        keep(found)
        console.say(f"{path}: {found.measured}")
