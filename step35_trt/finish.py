"""The last step of a sealed bundle, on the machine that it is for: segments compiled by the TensorRT there.

Networks are written anew from what the bundle records; no checkpoint is needed. Engines go beside the rest
under a journal, one at a time; the manifest is replaced last, so that a bundle is complete or says that it is
not.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from step35_trt import bundle
from step35_trt.build_estimate import RATES, BuildRates
from step35_trt.build_tensorrt import compile_segment
from step35_trt.bundle import MANIFEST, SEGMENTS, Bundle
from step35_trt.deployment import Deployment
from step35_trt.dialects.tensorrt_segment import Builder
from step35_trt.errors import UsageError
from step35_trt.journal import JOURNAL, Journal, check_room, plain_os_errors, replacing
from step35_trt.program import SteppedProgram
from step35_trt.progress import silent
from step35_trt.runtime.gpu import check_gpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from step35_trt.bundle import Manifest
    from step35_trt.progress import Progress


def finish(
    directory: Path,
    progress: Progress = silent,
    builder_for: Callable[[str], Builder] = Builder.tensorrt,
) -> bool:
    """Compile what a sealed bundle lacks; an interrupted run goes on where it stopped.

    Args:
        directory: The bundle.
        progress: Told how many segments are done, of how many, and what TensorRT is at.
        builder_for: Gives the builder for a compute capability.

    Returns:
        False where nothing was left to do.

    Raises:
        Step35Error: one of its kinds; what was compiled stays for the next run.
    """
    opened = Bundle.open(directory)
    manifest, program = opened.manifest, opened.program
    if not manifest.unfinished:
        (directory / SEGMENTS / JOURNAL).unlink(missing_ok=True)
        return False
    assert isinstance(program, SteppedProgram)
    check_gpu(opened)
    deployment = Deployment.of_bundle(opened)
    builder = builder_for(deployment.capability)
    keys = {file: key for key, file in program.segments.items()}
    with _writing(directory, f"{manifest.key} {builder.version} {deployment.capability}") as journal:
        each = BuildRates.load(RATES).segment_bytes
        check_room(directory / SEGMENTS, len(manifest.unfinished) * each)
        for done, file in enumerate(manifest.unfinished):
            name = PurePosixPath(file).name
            if not journal.finished(name):

                def told(step: int, steps: int, phase: str, done: int = done, name: str = name) -> None:
                    progress(done, len(manifest.unfinished), f"{name}: {phase} {step}/{steps}")

                (directory / file).write_bytes(compile_segment(deployment, keys[file], builder, told))
                journal.finish(name)
            progress(done + 1, len(manifest.unfinished), file)
        made = {file: journal.records[PurePosixPath(file).name] for file in manifest.unfinished}
        complete = manifest.model_copy(
            update={
                "files": manifest.files | made,
                "unfinished": (),
                "versions": manifest.versions | _compiler(manifest, builder),
            }
        )
        with replacing(directory / MANIFEST) as stream:
            stream.write(complete.sealed().encode())
            stream.flush()
            os.fsync(stream.fileno())
        bundle.sync(directory)
        journal.path.unlink()
    return True


def _compiler(manifest: Manifest, builder: Builder) -> dict[str, str]:
    """The version that a loader compares: the package's, or the module's where no package says it."""
    target = manifest.engine.target
    found = bundle.versions(target)
    wanted = bundle.FINISHING[target]
    return {name: builder.version if found[name] == "none" else found[name] for name in wanted}


@contextmanager
def _writing(directory: Path, key: str) -> Iterator[Journal]:
    """The journal of the segments' folder, locked.

    Raises:
        UsageError: another run is at it, or the bundle cannot be written.
    """
    folder = directory / SEGMENTS
    with plain_os_errors(folder):
        folder.mkdir(exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"{directory} is being finished by another run") from None
            yield Journal.open(folder, key)
        finally:
            os.close(handle)
