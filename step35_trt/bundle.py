"""The artefact: a directory with a manifest, checked before anything in it is loaded."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from step35_trt import __version__
from step35_trt.config import Step35Config
from step35_trt.digests import FileRecord, damaged, unlike
from step35_trt.engine import EngineSpec, Target
from step35_trt.errors import CorruptInputError, UnsupportedError, UsageError
from step35_trt.program import Program, SteppedProgram
from step35_trt.quantize.recipe import Recipe

if TYPE_CHECKING:
    from step35_trt.progress import Progress

SCHEMA = 2
AGAIN = "Build the bundle again with build-engine."
MANIFEST = "manifest.json"
PROGRAM = "program.json"
TOKENIZER = "tokenizer"
WEIGHTS = "weights"
KERNELS = "kernels"
SEGMENTS = "segments"
REPORTS = "reports"
# What a bundle of each target depends on, by the name that people know: the package that brings it.
DEPENDENCIES: dict[Target, dict[str, str]] = {
    "cpu": {"onnxruntime": "onnxruntime"},
    "torch": {},  # what it holds is data, which any version runs
    "tensorrt-rtx": {"tensorrt-rtx": "tensorrt-rtx-cu13", "triton": "triton"},
    "tensorrt": {"tensorrt": "tensorrt", "triton": "triton"},
}
# Packages that bring the same, built for one version of CUDA.
SAME = {"tensorrt": ("tensorrt-cu13", "tensorrt-cu12")}
# What has done its work when a bundle is built: cubins are launched by the driver alone.
COMPILERS = frozenset({"triton"})
# What executes engines; without it torch runs what they were compiled from.
ENGINE_RUNTIMES = frozenset({"tensorrt", "tensorrt-rtx"})
# Dependencies that a bundle takes up only when it is finished on the machine that it is for.
FINISHING: dict[Target, frozenset[str]] = {"tensorrt": frozenset({"tensorrt"})}


class Manifest(BaseModel):
    """`manifest.json`.

    `versions` are those the bundle depends on; `quantized` is the recipe that the checkpoint went through on
    its way to the engine's own `recipe`; `notes` say where it computes something other than the
    checkpoint's arithmetic. `model` is the checkpoint's `config.json` as it was. `unfinished` are files that
    the program needs and `build-engine --finish` still has to make. `seal` is the BLAKE2b-256 of the text
    without it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    schema_version: int
    key: str
    versions: dict[str, str]
    engine: EngineSpec
    recipe: Recipe
    quantized: Recipe | None = None
    max_tokens: int
    notes: tuple[str, ...]
    files: dict[str, FileRecord]
    model: dict[str, Any]
    unfinished: tuple[str, ...] = ()
    seal: str = ""

    def sealed(self) -> str:
        """The text of `manifest.json`."""
        content = self.model_copy(update={"seal": ""}).model_dump_json(indent=1)
        return content.replace(_seal(""), _seal(_digest(content)))

    def seals(self, text: str) -> bool:
        """Whether the text that this was read from is the one that was written."""
        return self.seal == _digest(text.replace(_seal(self.seal), _seal("")))

    def write(self, directory: Path) -> None:
        """Put it into a bundle, synced."""
        path = directory / MANIFEST
        path.write_text(self.sealed(), encoding="utf-8")
        sync(path)


class Bundle(BaseModel):
    """An opened bundle: what it says of itself, with its files seen to be there."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)
    directory: Path
    manifest: Manifest
    program: Program | SteppedProgram
    config: Step35Config

    @classmethod
    def open(cls, directory: Path) -> Bundle:
        """Read and check a bundle: small files whole, weights by their size and a few blocks.

        Raises:
            UsageError: there is no bundle.
            UnsupportedError: it needs another version of this program or of a runtime.
            CorruptInputError: a file is missing, changed or of another size.
        """
        path = directory / MANIFEST
        if not path.is_file():
            hint = "Make one with: step35-trt build-engine CHECKPOINT -o BUNDLE --engine NAME"
            partial = staging(directory).is_dir()
            raise UsageError(
                f"{directory} is not a finished bundle" + (": its build was interrupted" if partial else ""),
                "Run the same build-engine command again; it resumes." if partial else hint,
            )
        try:
            text = path.read_text(encoding="utf-8")
            raw = json.loads(text)
            if isinstance(raw, dict) and raw.get("schema_version") != SCHEMA:
                raise UnsupportedError(
                    f"{directory} has bundle schema {raw.get('schema_version')}, this program reads {SCHEMA}",
                    "Build the bundle again with this version.",
                )
            manifest = Manifest.model_validate(raw)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "it"
            raise CorruptInputError(f"{path} is damaged: {where}: {first['msg']}", AGAIN) from None
        except (ValueError, RecursionError) as error:
            raise CorruptInputError(f"{path} is damaged: {error}", AGAIN) from None
        if not manifest.seals(text):
            raise CorruptInputError(
                f"{path} has changed since the bundle was built", rebuild(directory, manifest)
            )
        if manifest.engine.target == "cpu":
            check_versions(manifest)  # a GPU bundle may be looked at anywhere; `runtime.gpu` checks it
        _check_files(directory, manifest)
        program = _program(directory, manifest)
        return cls(
            directory=directory,
            manifest=manifest,
            program=program,
            config=Step35Config.parse(manifest.model),
        )

    def damaged(self, progress: Progress | None = None) -> list[str]:
        """Files whose content is not the manifest's; reads everything."""
        return damaged(self.directory, self.manifest.files, progress)


def staging(directory: Path) -> Path:
    """Where a bundle lies while it is being written: beside the directory that a link leads to."""
    place = Path(os.path.realpath(directory))
    return place.parent / f"{place.name}.partial"


def versions(target: Target) -> dict[str, str]:
    """The versions here of what bundles of a target depend on, none imported; 'none' where missing."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"step35-trt": __version__}
    for name, package in DEPENDENCIES[target].items():
        found[name] = "none"
        for same in (package, *SAME.get(package, ())):
            with suppress(PackageNotFoundError):
                found[name] = version(same)
                break
    return found


def build_versions(target: Target) -> dict[str, str]:
    """Those of `versions` that decide what a build writes, before anything is finished elsewhere."""
    later = FINISHING.get(target, frozenset())
    return {name: version for name, version in versions(target).items() if name not in later}


def finish_command(directory: Path) -> str:
    """What makes an unfinished bundle complete."""
    return f"step35-trt build-engine --finish {directory}"


def rebuild(directory: Path, manifest: Manifest) -> str:
    """What mends a bundle."""
    engine = f"--engine {manifest.engine.name}"
    recipe = f" --recipe {manifest.quantized.name}" if manifest.quantized else ""
    return f"Remove it and run: step35-trt build-engine CHECKPOINT -o {directory} {engine}{recipe}"


def _seal(digits: str) -> str:
    return f'"seal": "{digits}"'


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def record(path: Path, name: str) -> FileRecord:
    """What the file that a bundle calls `name` will be compared by."""
    return FileRecord.weights(path) if name.startswith(f"{WEIGHTS}/") else FileRecord.small(path)


def sync(path: Path) -> None:
    """Force a file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def forget(path: Path) -> None:
    """Drop a file from the page cache, so that its next reader takes it from the disk; needs it synced."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def check_versions(manifest: Manifest) -> None:
    """Compare the packages here with those that a bundle was built with and cannot do without.

    Raises:
        UnsupportedError: one is missing or of another version.
    """
    have = versions(manifest.engine.target)
    for name in DEPENDENCIES[manifest.engine.target].keys() - ENGINE_RUNTIMES - COMPILERS:
        check_version(manifest, name, have[name])


def check_version(manifest: Manifest, name: str, have: str) -> None:
    """Compare a dependency's version with the one that a bundle was built with.

    Raises:
        UnsupportedError: it is another.
    """
    wanted, package = manifest.versions.get(name, "none"), DEPENDENCIES[manifest.engine.target][name]
    if have != wanted:
        raise UnsupportedError(
            f"the bundle was built for {name} {wanted}, this machine has {have}",
            f"pip install {package}=={wanted}, or build the bundle again.",
        )


def _check_files(directory: Path, manifest: Manifest) -> None:
    for name, record in manifest.files.items():
        path = directory / name
        if not path.resolve().is_relative_to(directory.resolve()):
            raise CorruptInputError(f"the manifest names a file outside the bundle: {name}")
        if not path.is_file():
            raise CorruptInputError(f"{name} is missing from {directory}", rebuild(directory, manifest))
        if path.stat().st_size != record.size:
            raise CorruptInputError(
                f"{name} has {path.stat().st_size} bytes instead of {record.size}",
                rebuild(directory, manifest),
            )
    for name in unlike(directory, manifest.files):
        raise CorruptInputError(
            f"{name} has changed since the bundle was built", rebuild(directory, manifest)
        )


def _program(directory: Path, manifest: Manifest) -> Program | SteppedProgram:
    content = (directory / PROGRAM).read_bytes()
    if manifest.engine.target == "cpu":
        return Program.model_validate_json(content)
    program = SteppedProgram.model_validate_json(content)
    # Files that the manifest lists are there by now.
    for name in sorted(program.files - manifest.files.keys() - set(manifest.unfinished)):
        raise CorruptInputError(
            f"the program needs {name}, which {directory} has not", rebuild(directory, manifest)
        )
    return program
