"""The command line. Back ends are imported by the command that needs them."""

from __future__ import annotations

import sys

import rich_click as click
from click.exceptions import NoArgsIsHelpError

from step35_trt import __version__, console
from step35_trt.commands import batching, benching, examining, kernels, making, running, serving
from step35_trt.errors import NO_ROOM, DoesNotFitError, Step35Error, UsageError

CONTEXT = {"help_option_names": ["-h", "--help"], "token_normalize_func": lambda name: name.replace("_", "-")}
INTERRUPTED = 130  # what a shell reports for a program that SIGINT ended
COMMANDS = (
    *(making.build_engine, making.quantize, making.export_onnx),
    *(running.generate, running.logits),
    *(examining.verify, examining.inspect, examining.plan, examining.doctor),
    *(kernels.kernels, kernels.tune),
    *(batching.batch, serving.triton_repo, serving.serve, benching.bench),
)


def main() -> None:
    """Entry point: runs a command and turns expected failures into a sentence and an exit code."""
    console.prepare()
    try:
        cli.main(standalone_mode=False)
    except Step35Error as error:
        console.fail(error.message, error.hint)
        sys.exit(error.exit_code)
    except NoArgsIsHelpError as error:
        error.show()
        sys.exit(UsageError.exit_code)
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        console.fail(error.format_message(), f"See: {context.command_path} --help" if context else "")
        sys.exit(UsageError.exit_code)
    except (KeyboardInterrupt, click.Abort):
        console.fail(
            "interrupted",
            "build-engine, quantize and batch go on where they stopped when they are run again.",
        )
        sys.exit(INTERRUPTED)
    except OSError as error:
        console.fail(f"{error.filename or 'output'}: {error.strerror or error}")
        sys.exit(DoesNotFitError.exit_code if error.errno in NO_ROOM else UsageError.exit_code)
    except MemoryError as error:
        console.fail(f"there is not enough memory{f': {error}' if str(error) else ''}")
        sys.exit(DoesNotFitError.exit_code)


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="step35-trt")
def cli() -> None:
    """Compile Step 3.5 Flash for a target and run it."""


for _command in COMMANDS:
    cli.add_command(_command)
