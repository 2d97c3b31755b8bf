"""Writes the repository: a few small files that point to a bundle."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from step35_trt.bundle import Bundle
from step35_trt.errors import UsageError
from step35_trt.journal import plain_os_errors
from step35_trt.triton_repo.config_text import engine_config, tokens_config
from step35_trt.triton_repo.limits import ServingLimits
from step35_trt.triton_repo.model import BUNDLE
from step35_trt.triton_repo.readme import readme

if TYPE_CHECKING:
    from pathlib import Path

ENGINE, TOKENS = "step35", "step35_tokens"
SEQUENCES = 32  # that run at once on a CPU, where memory sets no earlier limit

_MODEL = '''\
"""All that runs is in the package step35-trt, in the environment of Triton's Python backend."""

from step35_trt.triton_repo.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def write_repository(bundle: Path, out: Path, sequences: int | None = None) -> bool:
    """Write a model repository for a bundle.

    Args:
        bundle: The bundle; it is referred to by its absolute path.
        out: The repository's directory.
        sequences: Requests that run at once; None: as the engine says, or 32 on a CPU.

    Returns:
        Whether anything was written: a repository that is there already is left alone.

    Raises:
        UsageError: the directory holds something else or cannot be written, or `sequences` is off.
        DoesNotFitError: there is no room; nothing is left behind.
        CorruptInputError: the bundle is damaged.
    """
    if sequences is not None and sequences < 1:
        raise UsageError(f"a server runs at least one sequence, not {sequences}")
    files = _files(Bundle.open(bundle), sequences)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if all(_reads(out / name) == content for name, content in files.items()):
            return False
        raise UsageError(f"{out} is there already and holds something else", "Choose another directory.")
    stage = out.with_name(f"{out.name}.partial-{os.getpid()}")
    with plain_os_errors(stage):
        try:
            for name, content in files.items():
                path = stage / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content, encoding="utf-8")
            (stage / TOKENS / "1").mkdir()  # an ensemble has no files, but Triton wants a version
            os.replace(stage, out)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise
    return True


def _files(bundle: Bundle, sequences: int | None) -> dict[str, str]:
    engine = bundle.manifest.engine
    cpu = engine.target == "cpu"
    limits = ServingLimits.of(
        bundle.manifest.max_tokens, sequences or (SEQUENCES if cpu else engine.max_sequences)
    )
    parameters = {BUNDLE: str(bundle.directory.resolve())}
    parameters |= {name: str(value) for name, value in limits.model_dump().items()}
    return {
        "README.md": readme(ENGINE, TOKENS, parameters),
        f"{ENGINE}/config.pbtxt": engine_config(ENGINE, "KIND_CPU" if cpu else "KIND_MODEL", parameters),
        f"{ENGINE}/1/model.py": _MODEL,
        f"{TOKENS}/config.pbtxt": tokens_config(TOKENS, ENGINE),
    }


def _reads(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
