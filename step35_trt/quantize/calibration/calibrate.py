"""The stages in order, each remembered by one file, so that an interrupted calibration goes on."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import ValidationError

from step35_trt.errors import UnsupportedError, UsageError
from step35_trt.journal import plain_os_errors, replacing
from step35_trt.quantize.calibration.report import StageReport
from step35_trt.quantize.folding import Folding, Scaling

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from step35_trt.checkpoint import Checkpoint
    from step35_trt.progress import Progress
    from step35_trt.quantize.calibration.setup import Setup
    from step35_trt.quantize.recipe import Recipe

KEY = "calibration.key"
OURS = ("*.json", "*.safetensors", "*.f32", "*.scratch", "*.partial", KEY)


@dataclass(frozen=True)
class Calibration:
    """The result: what is folded, and what was found.

    `folding` reads a stage's factors from their file when they are asked for, so that a large model's (an
    eighth of a byte a weight) never lie in memory together.
    """

    folding: Folding
    stages: tuple[StageReport, ...]


def calibrate(
    source: Checkpoint,
    recipe: Recipe,
    token_ids: NDArray[np.int64],
    work: Path,
    *,
    method: Literal["awq", "none"] | None = None,
    max_host_memory: int | None = None,
    min_expert_tokens: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Calibration:
    """Calibrate every layer, the heads and the MTP modules; an interrupted run goes on where it stopped.

    The result depends on the arguments, torch's number of threads and the machine's arithmetic only: a
    resumed run gives the same bytes.

    Args:
        source: The checkpoint.
        recipe: How parameters will be stored.
        token_ids: `[sequences, length]`.
        work: A directory for what is finished and for hidden states; made where it is not.
        method: `awq` searches scales and clips for int4, `none` rounds to nearest and only measures; None:
            what the recipe says.
        max_host_memory: Bytes of address space the process may use; what passes at a time follows from it.
        min_expert_tokens: Fewer make an expert fall back to its weights alone; None: what the recipe says.
        device: Of torch; only `cpu` has been run.
        progress: Called with bytes of weights, as in a build.

    Raises:
        UnsupportedError: ModelOpt or torch is not installed.
        DoesNotFitError: not enough memory for one sequence, or no room in `work`.
        UsageError: `work` cannot be written, another process is using it, or a token id is none.
    """
    for package in ("torch", "modelopt"):
        if find_spec(package) is None:
            raise UnsupportedError(f"calibration needs {package}", "pip install 'step35-trt[quantize]'")
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about versions of packages that nothing here uses
        import modelopt.torch.quantization  # noqa: F401 - now: what it maps counts in `chunk_tokens`

    from step35_trt.quantize.calibration.setup import Setup, chunk_tokens
    from step35_trt.quantize.calibration.spool import Spool

    config = source.config
    sequences, length = token_ids.shape
    if token_ids.size and not 0 <= token_ids.min() <= token_ids.max() < config.vocab_size:
        raise UsageError(f"token ids must lie in the vocabulary of {config.vocab_size}")
    if length <= 1 + config.num_nextn_predict_layers:
        raise UsageError(f"sequences of {length} tokens are too short for the MTP modules")
    declared = recipe.calibration
    least = (
        min_expert_tokens if min_expert_tokens is not None else declared.min_expert_tokens if declared else 0
    )
    search = (method or (declared.method if declared else "none")) == "awq"
    setup = Setup(
        source=source,
        coding=recipe.coding,
        token_ids=torch.from_numpy(token_ids),
        spool=Spool(work, token_ids.size, config.hidden_size),
        device=torch.device(device),
        search=search,
        fp8_activations=recipe.activations == "fp8",
        min_expert_tokens=least,
        chunk=chunk_tokens(config, sequences, length, max_host_memory),
    )
    settings = [recipe.model_dump(mode="json"), search, least, length, device, torch.get_num_threads()]
    with locked(work):
        _begin(work, _key(source, settings, token_ids))
        return _run(setup, work, progress)


def _run(setup: Setup, work: Path, progress: Progress | None) -> Calibration:
    from step35_trt.quantize.calibration.sites import stages
    from step35_trt.quantize.calibration.stage import calibrate_stage

    every = stages(setup.config)
    shape = setup.source.shape
    sizes = [sum(int(np.prod(shape(name))) for name in stage.matrices) for stage in every]
    total, done = 2 * sum(sizes), 0
    reports: list[StageReport] = []
    for number, (stage, size) in enumerate(zip(every, sizes, strict=True)):
        name = f"{number:03}-{stage.name}"
        report = _finished(work, name)
        if report is None:
            before = done

            def tick(values: int, before: int = before, name: str = stage.name) -> None:
                if progress:
                    progress(before + 2 * values, total, name)

            folding, report = calibrate_stage(setup, stage, tick)
            folding.save(work / f"{name}.safetensors")
            with replacing(work / f"{name}.json") as stream:  # last: this file says that the stage is done
                stream.write(report.model_dump_json().encode())
        if stage.kind != "head" and stage.reads != setup.config.num_hidden_layers:
            setup.spool.drop(stage.reads)  # the head and the first module read the same
        elif stage.kind == "mtp":
            setup.spool.drop(stage.reads)
        reports.append(report)
        done += 2 * size
        if progress:
            progress(done, total, stage.name)
    setup.spool.drop(every[-1].reads + 1)
    files = [work / f"{number:03}-{stage.name}.safetensors" for number, stage in enumerate(every)]
    return Calibration(Folding(StoredScalings.of(files)), tuple(reports))


def _finished(work: Path, name: str) -> StageReport | None:
    try:
        return StageReport.model_validate_json((work / f"{name}.json").read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


class StoredScalings(Mapping[str, Scaling]):
    """Scalings that lie in the stages' files; the last stage asked for is kept."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files
        self._loaded: tuple[Path, Mapping[str, Scaling]] | None = None

    @classmethod
    def of(cls, files: list[Path]) -> StoredScalings:
        """Read which file has which parameter."""
        from safetensors import safe_open

        where: dict[str, Path] = {}
        for file in files:
            with safe_open(file, "numpy") as stored:
                where |= {key.rpartition(".")[0]: file for key in stored.keys()}  # noqa: SIM118 - no mapping
        return cls(where)

    def __getitem__(self, name: str) -> Scaling:
        file = self._files[name]
        if self._loaded is None or self._loaded[0] != file:
            self._loaded = None
            self._loaded = (file, Folding.load(file).scalings)
        return self._loaded[1][name]

    def __contains__(self, name: object) -> bool:
        return name in self._files  # without loading the stage

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _begin(work: Path, key: str) -> None:
    """Go on with what has the same key, else empty the directory of what a calibration leaves."""
    path = work / KEY
    if path.exists() and path.read_text(encoding="utf-8") == key:
        return
    for pattern in OURS:
        for old in work.glob(pattern):
            old.unlink()
    with replacing(path) as stream:
        stream.write(key.encode())


def _key(source: Checkpoint, settings: object, token_ids: NDArray[np.int64]) -> str:
    """What the result depends on, without reading the weights."""
    parts = [
        [version(package) for package in ("torch", "nvidia-modelopt", "step35-trt")],
        settings,
        source.identity(),
        hashlib.blake2b(token_ids.tobytes()).hexdigest(),
    ]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """Keep a second calibration out of the directory.

    Raises:
        UsageError: another process has it.
    """
    with plain_os_errors(work):
        work.mkdir(parents=True, exist_ok=True)
        handle = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another calibration is using {work}") from None
        yield
    finally:
        os.close(handle)
