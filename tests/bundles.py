"""Bundles whose manifests are changed as nobody should."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from step35_trt.bundle import MANIFEST, Manifest, record

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def edit_manifest(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest's JSON, and seal it again."""
    raw = json.loads((directory / MANIFEST).read_text())
    edit(raw)
    Manifest.model_validate(raw).write(directory)


def record_again(directory: Path, name: str) -> None:
    """Let the manifest know a changed file."""
    changed = record(directory / name, name).model_dump()
    edit_manifest(directory, lambda raw: raw["files"].update({name: changed}))
