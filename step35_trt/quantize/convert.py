"""A checkpoint into another precision: streamed, remembered shard by shard, the same bytes every time.

Memory holds a few slices however large the model is. The result is an ordinary checkpoint in the layout of
`formats`: shards of one layer or 5 GB, their index, config, tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from step35_trt import __version__
from step35_trt.checkpoint import Checkpoint, expected_tensors
from step35_trt.errors import UsageError
from step35_trt.journal import staged
from step35_trt.parallel import in_order
from step35_trt.quantize.declared import Fp8Blocks
from step35_trt.quantize.folding import Folding
from step35_trt.quantize.parts import Converter, Target, parts_of
from step35_trt.quantize.quant_config import declare
from step35_trt.quantize.shard import Shard

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from step35_trt.journal import Journal
    from step35_trt.progress import Progress
    from step35_trt.quantize.recipe import Recipe

MOST_BYTES = 5_000_000_000  # of a shard, unless one parameter is larger
THREADS = min(4, os.cpu_count() or 1)  # more would not fit the memory budget
INDEX = "model.safetensors.index.json"
# What else belongs to a checkpoint: tokenizer, templates, generation settings, the model's own code, licence.
CARRIED = (
    "*token*.json",
    "*.jinja",
    "generation_config.json",
    "vocab.*",
    "merges.txt",
    "configuration_*.py",
    "modeling_*.py",
    "LICENSE*",
)


def conversion_key(source: Checkpoint, recipe: Recipe, inputs: Sequence[str] = ()) -> str:
    """What a result depends on, without reading the weights; `inputs` are those of a calibration."""
    parts = [__version__, recipe.model_dump(mode="json"), list(inputs), source.identity()]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def is_there(out: Path, key: str) -> bool:
    """Whether a directory is the whole result of that key.

    Raises:
        UsageError: it is something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        index = json.loads((out / INDEX).read_text(encoding="utf-8"))
        if index["metadata"]["step35_trt_key"] == key:
            return True
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UsageError(
        f"{out} exists and is not this conversion's result", "Remove it, or name another directory with -o."
    )


def convert(
    source: Checkpoint,
    out: Path,
    recipe: Recipe,
    key: str,
    folding: Folding | None = None,
    more: Mapping[str, bytes] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a checkpoint in the precisions of a recipe; an interrupted run goes on where it stopped.

    Args:
        source: What is converted.
        out: Where the new one goes; does not exist yet, or is empty.
        recipe: Precisions; a calibration it asks for is in `folding`, or left out.
        key: Its `conversion_key`; the index keeps it.
        folding: Factors and clipping to apply on the way.
        more: Small files to add, by name.
        progress: Told how far it is.

    Raises:
        Step35Error: one of its kinds; what was finished stays for the next run.
    """
    applied = folding or Folding()
    plan = Plan.make(source, applied, recipe, key, more or {})
    # Only shards of the same factors fit together: a calibration repeated elsewhere may differ in a bit.
    with staged(out, f"{key} {applied.digest()}", plan.sizes) as (stage, journal):
        plan.write(stage, journal, progress)


@dataclass(frozen=True)
class Plan:
    """Every file of a converted checkpoint, before the first byte is written."""

    source: Checkpoint
    folding: Folding
    shards: tuple[tuple[Shard, tuple[Target, ...]], ...]
    texts: dict[str, bytes]

    @classmethod
    def make(
        cls, source: Checkpoint, folding: Folding, recipe: Recipe, key: str, more: Mapping[str, bytes]
    ) -> Plan:
        """Lay out all shards.

        Raises:
            UnsupportedError: the recipe does not cover the model.
        """
        targets = [
            Target.of(source, name, recipe.coding(name, shape), folded=name in folding.scalings)
            for name, shape in expected_tensors(source.config).items()
        ]
        groups = _shards(targets)
        shards = []
        for i, group in enumerate(groups):
            entries = {tensor: entry for target in group for tensor, entry in target.entries.items()}
            name = f"model-{i + 1:05}-of-{len(groups):05}.safetensors"
            shards.append((Shard.lay_out(name, entries), tuple(group)))
        texts = _texts(source, recipe, targets, [shard for shard, _ in shards], key)
        return cls(source, folding, tuple(shards), {**more, **texts})

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file."""
        return {shard.name: shard.size for shard, _ in self.shards} | {
            n: len(t) for n, t in self.texts.items()
        }

    def write(self, stage: Path, journal: Journal, progress: Progress | None) -> None:
        """Write what is not written yet.

        While one shard goes to the disk and is recorded, the next is converted.
        """
        total = sum(target.nbytes for _, targets in self.shards for target in targets)
        done = 0
        converter = Converter(self.source, self.folding)
        with ThreadPoolExecutor(1) as recorder:
            recorded: Future[None] | None = None
            try:
                for shard, targets in self.shards:
                    if journal.finished(shard.name):
                        done += sum(target.nbytes for target in targets)
                        continue
                    for written in _write_shard(converter, shard, targets, stage):
                        done += written
                        if progress:
                            progress(done, total, shard.name)
                    if recorded:
                        recorded.result()
                    recorded = recorder.submit(journal.finish, shard.name, hashed=False)
                if recorded:
                    recorded.result()
            finally:
                converter.close()
        for name, text in self.texts.items():
            (stage / name).write_bytes(text)
            journal.finish(name, hashed=False)


def _write_shard(converter: Converter, shard: Shard, targets: Sequence[Target], stage: Path) -> Iterator[int]:
    for target in targets:
        converter.open(target)
    handle = shard.open(stage)
    try:
        parts = [part for target in targets for part in parts_of(target)]
        yield from in_order(lambda part: converter.convert(part, shard, handle), parts, THREADS)
    finally:
        os.close(handle)
        converter.close()


def _shards(targets: Sequence[Target]) -> list[list[Target]]:
    """A shard for what lies outside the layers in a row, one for each layer, more where it is too large."""
    groups: list[list[Target]] = []
    last, size = "", 0
    for target in targets:
        pieces = target.name.split(".")
        where = pieces[2] if pieces[1] == "layers" else "outside"
        if where != last or size + target.nbytes > MOST_BYTES:
            groups.append([])
            last, size = where, 0
        groups[-1].append(target)
        size += target.nbytes
    return groups


def _texts(
    checkpoint: Checkpoint, recipe: Recipe, targets: Sequence[Target], shards: Sequence[Shard], key: str
) -> dict[str, bytes]:
    """The small files: what the checkpoint had beside its weights, and what says how they lie now."""
    directory = checkpoint.directory
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    before = config.pop("quantization_config", None)
    hf_quant_config, declared = declare(recipe, {t.name: t.coding for t in targets if len(t.shape) > 1})
    kept = all(target.copied for target in targets if target.coding.kind == "fp8-blocks")
    if declared and isinstance(checkpoint.config.quantization_config, Fp8Blocks) and kept:
        declared = before or declared  # untouched: what it declares stays as well
    if declared:
        config["quantization_config"] = declared
    size = sum(target.nbytes for target in targets)
    index = {
        "metadata": {"total_size": size, "step35_trt_key": key},
        "weight_map": {tensor: shard.name for shard in shards for tensor in shard.offsets},
    }
    texts = {
        path.name: path.read_bytes()
        for pattern in CARRIED
        for path in sorted(directory.glob(pattern))
        if path.is_file()
    }
    made = {"config.json": config, "hf_quant_config.json": hf_quant_config, INDEX: index}
    return texts | {name: _json(value) for name, value in made.items() if value is not None}


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
