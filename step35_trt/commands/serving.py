"""Commands for Triton."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import rich_click as click

from step35_trt import console
from step35_trt.commands.parameters import AT_ONCE, PATH

if TYPE_CHECKING:
    from pathlib import Path


PORT = click.IntRange(1, 65535)


@click.command("triton-repo")
@click.argument("bundle", type=PATH)
@click.option("-o", "--output", required=True, type=PATH, help="Directory of the model repository.")
@click.option("--sequences", type=AT_ONCE, help="Requests that run at once.")
def triton_repo(bundle: Path, output: Path, sequences: int | None) -> None:
    """Write a Triton model repository that serves BUNDLE, which stays where it is."""
    from step35_trt.triton_repo.write import write_repository

    written = write_repository(bundle, output, sequences)
    console.say(
        f"{output} is {'ready' if written else 'there already'}; {output / 'README.md'} says how to serve it"
    )


@click.command()
@click.argument("repository", type=PATH)
@click.option("--address", default="127.0.0.1", show_default=True, help="Interface to listen on.")
@click.option("--http-port", default=8000, show_default=True, type=PORT)
@click.option("--grpc-port", default=8001, show_default=True, type=PORT)
@click.option("--metrics-port", default=8002, show_default=True, type=PORT)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def serve(
    repository: Path,
    address: str,
    http_port: int,
    grpc_port: int,
    metrics_port: int,
    arguments: tuple[str, ...],
) -> None:
    """Serve REPOSITORY with the tritonserver found here; ARGUMENTS after -- are handed on to it."""
    from step35_trt.triton_repo.launch import Ports, command, find_server

    server = find_server()
    line, environment = command(
        server, repository, Ports(http_port, grpc_port, metrics_port), address, arguments
    )
    os.execve(server.program, line, environment)
