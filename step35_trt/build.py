"""From a checkpoint and an engine spec to a bundle, in steps that a journal remembers."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from step35_trt import bundle
from step35_trt.build_cpu import cpu_contents, exported_steps
from step35_trt.build_steps import BuildStep, Contents, report_steps, tokenizer_steps
from step35_trt.bundle import SCHEMA, Manifest
from step35_trt.checkpoint import Checkpoint
from step35_trt.errors import CorruptInputError, Step35Error, UsageError
from step35_trt.journal import check_room, staged
from step35_trt.quantize.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from step35_trt.dialects.onnx import Spelling
    from step35_trt.engine import EngineSpec, Target
    from step35_trt.journal import Journal
    from step35_trt.progress import Progress
    from step35_trt.quantize.run import Job


def build(
    checkpoint: Path,
    out: Path,
    spec: EngineSpec,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> bool:
    """Build a bundle; an interrupted build goes on where it stopped.

    Args:
        checkpoint: A directory.
        out: The bundle to be.
        spec: What it is for.
        progress: Told how far it is.
        say: Told what is about to be made, where that is known.

    Returns:
        False where the very same bundle was there already.

    Raises:
        Step35Error: one of its kinds; what was finished stays for the next run.
    """
    source = Checkpoint.open(checkpoint)
    recipe = Recipe.load(spec.recipe)
    check_modules_differ(source)
    plan = _Plan.make(source, recipe, spec)
    if _is_there(out, plan.key):
        return False
    _announce(out, plan.contents, say)
    _write(out, plan.key, plan.steps, progress, plan.write_manifest)
    return True


def build_quantized(
    job: Job,
    out: Path,
    spec: EngineSpec,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> bool:
    """Quantise a checkpoint and build a bundle of the result, which lies beside the bundle until then.

    Either half goes on where it stopped. Returns and raises as `build` does.
    """
    recipe, between = Recipe.load(spec.recipe), out.with_name(out.name + ".quantized")
    key = _key([job.key], recipe, spec.model_dump_json(), spec.target)
    there = _is_there(out, key)
    if not there:
        check_modules_differ(job.source)
        if spec.target != "cpu":
            from step35_trt.build_estimate import estimate_build

            expected = estimate_build(job.source.config, spec)
            say(expected.sentence)
            # What is quantised lies beside the bundle until that is whole, and is as large.
            check_room(bundle.staging(out), 2 * expected.nbytes, between, bundle.staging(between))
        job.run(between, progress)
        if job.token_ids is not None:
            # What calibrating has measured is there; a report of it costs nothing more.
            from step35_trt.quantize.report.write import write_report

            write_report(job, between, None, progress)
        plan = _Plan.make(Checkpoint.open(between), recipe, spec, job)
        _write(out, key, plan.steps, progress, plan.write_manifest)
    shutil.rmtree(between, ignore_errors=True)
    return not there


def export_onnx(
    checkpoint: Path, out: Path, spelling: Spelling, recipe: Recipe, progress: Progress | None = None
) -> list[str]:
    """Write the graphs and their weights into a new directory; returns the files' names.

    Raises:
        Step35Error: one of its kinds; what was finished stays for the next run.
    """
    source = Checkpoint.open(checkpoint)
    steps = exported_steps(source, recipe, spelling)
    if out.exists():
        raise UsageError(f"{out} exists already", "Name another directory with -o.")
    _write(
        out,
        _key(source.identity(), recipe, repr(spelling), "cpu"),
        steps,
        progress,
        lambda _stage, _journal: None,
    )
    return [step.file for step in steps]


def _announce(out: Path, contents: Contents, say: Callable[[str], None]) -> None:
    """Say what is about to be made.

    Raises:
        DoesNotFitError: the disk has no room for it; nothing was written yet.
    """
    if contents.sentence:
        say(contents.sentence)
    if contents.expected_bytes:
        check_room(bundle.staging(out), contents.expected_bytes)


def _write(
    out: Path,
    key: str,
    steps: Sequence[BuildStep],
    progress: Progress | None,
    seal: Callable[[Path, Journal], None],
) -> None:
    """Write what is not written yet, seal it, and give it its name."""
    total, done = sum(step.nbytes for step in steps), 0
    with staged(out, key, {step.file: step.nbytes for step in steps}) as (stage, journal):
        for step in steps:
            if journal.finished(step.file):
                done += step.nbytes
            else:
                for written in step.write(stage / step.file):
                    done += written
                    if progress:
                        progress(done, total, step.file)
                journal.finish(step.file)
            if progress:
                progress(done, total, step.file)
        seal(stage, journal)


def check_modules_differ(source: Checkpoint) -> None:
    """MTP modules are three networks; a copy in the place of another is a broken checkpoint.

    Raises:
        CorruptInputError: two modules share a matrix.
    """
    layers = source.config.mtp_layers
    for i, first in enumerate(layers):
        for second in layers[i + 1 :]:
            for name in (n for n in source.tensors if n.startswith(f"{first.prefix}.")):
                other = second.prefix + name[len(first.prefix) :]
                if len(source.tensors[name].shape) == 2 and _same(source.stored(name), source.stored(other)):
                    raise CorruptInputError(
                        f"MTP modules share a weight: {name} equals {other}",
                        "Each module is trained on its own; take a checkpoint with three different ones.",
                    )


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    # Different weights differ in the first rows: nothing more is read.
    return all(np.array_equal(a[i : i + 64], b[i : i + 64]) for i in range(0, len(a), 64))


@dataclass(frozen=True)
class _Plan:
    """Every file of a bundle, before the first byte is written."""

    source: Checkpoint
    recipe: Recipe
    spec: EngineSpec
    contents: Contents
    steps: tuple[BuildStep, ...]
    key: str
    quantized: Recipe | None

    @classmethod
    def make(cls, source: Checkpoint, recipe: Recipe, spec: EngineSpec, job: Job | None = None) -> _Plan:
        if spec.target == "cpu":
            contents = cpu_contents(source, recipe)
        elif spec.target == "torch":
            from step35_trt.build_torch import torch_contents

            contents = torch_contents(source, recipe, spec)
        else:
            from step35_trt.build_tensorrt import gpu_contents

            contents = gpu_contents(source, recipe, spec)
        steps = (*contents.steps, *tokenizer_steps(source.directory), *report_steps(source.directory))
        identity: list[object] = [job.key] if job else source.identity()
        key = _key(identity, recipe, spec.model_dump_json(), spec.target)
        return cls(source, recipe, spec, contents, steps, key, job.recipe if job else None)

    def write_manifest(self, stage: Path, journal: Journal) -> None:
        config = self.source.config
        limit = config.max_position_embeddings
        manifest = Manifest(
            schema_version=SCHEMA,
            key=self.key,
            versions=bundle.build_versions(self.spec.target),
            engine=self.spec,
            recipe=self.recipe,
            quantized=self.quantized,
            max_tokens=min(self.spec.max_tokens or limit, limit),
            notes=self.contents.notes,
            files={step.file: journal.records[step.file] for step in self.steps},
            model=json.loads((self.source.directory / "config.json").read_text(encoding="utf-8")),
            unfinished=self.contents.unfinished,
        )
        manifest.write(stage)


def _key(source: list[object], recipe: Recipe, spelling: str, target: Target) -> str:
    """What the result depends on, without reading the weights: an interrupted build resumes only its own."""
    parts = [SCHEMA, bundle.build_versions(target), recipe.model_dump(mode="json"), spelling, source]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _is_there(out: Path, key: str) -> bool:
    if not out.exists():
        return False
    if out.is_dir() and not any(out.iterdir()):
        return False
    try:
        if bundle.Bundle.open(out).manifest.key == key:
            return True
    except Step35Error:
        pass
    raise UsageError(
        f"{out} exists and is not this build's result", "Remove it, or name another directory with -o."
    )
