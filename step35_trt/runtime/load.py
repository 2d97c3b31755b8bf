"""From a path to a session: a bundle, or a checkpoint through the torch oracle."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from step35_trt.bundle import MANIFEST, TOKENIZER, Bundle, staging
from step35_trt.errors import UnsupportedError, UsageError
from step35_trt.resources import NANO

if TYPE_CHECKING:
    from step35_trt.runtime.dialogue.text import Text
    from step35_trt.runtime.session import Session

CHECKPOINT_FILES = ("*.json", "*.safetensors", "*.jinja")
NAMES = "Give a checkpoint directory, a hub id, or 'nano'."


def resolve_checkpoint(name: str, files: tuple[str, ...] = CHECKPOINT_FILES) -> Path:
    """A checkpoint directory: a path, 'nano', or a repository of the Hugging Face hub.

    Of a repository what matches `files` is downloaded.

    Raises:
        UsageError: nothing of that name can be had.
    """
    if not name:
        raise UsageError("the checkpoint's name is empty", NAMES)
    if name == "nano":
        return NANO
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UsageError(f"{name} is not a directory", NAMES)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"{name} is no directory here and could not be fetched from the hub ({reason})"
        ) from None


def open_bundle(directory: Path) -> Session:
    """Check a bundle and open the back end it was built for."""
    return open_session(Bundle.open(directory))


def load_text(directory: Path, *, required: bool) -> Text | None:
    """The tokenizer of a bundle; None where it has none and none is required.

    Raises:
        UsageError: it is required and the checkpoint had none.
    """
    from step35_trt.runtime.dialogue.text import Text

    folder = directory / TOKENIZER
    if (folder / "tokenizer.json").is_file():
        return Text.load(folder)
    if required:
        raise UsageError(
            f"{directory} has no tokenizer: its checkpoint had no tokenizer.json", "Use --prompt-ids."
        )
    return None


def open_session(bundle: Bundle) -> Session:
    """The session of an opened bundle. Where several processes run it, only the first gets one.

    Raises:
        UnsupportedError: it is for another machine, or torch is not installed.
        UsageError: it is for another number of processes.
        SystemExit: in all processes but the first, when the first has ended.
    """
    from step35_trt.program import Program

    manifest = bundle.manifest
    if manifest.engine.target == "torch":
        return _torch_session(bundle)
    if not isinstance(bundle.program, Program):
        from step35_trt.runtime.gpu import check
        from step35_trt.runtime.placement import check_size, said_once

        with said_once():
            check(bundle)
            check_size(bundle.directory, bundle.program.ranks)
        from step35_trt.runtime.session_cuda import open_cuda

        return open_cuda(bundle)
    from step35_trt.runtime.session_onnx import OnnxSession

    return OnnxSession(
        bundle.directory,
        bundle.config,
        bundle.program,
        manifest.max_tokens,
        manifest.engine.cache_tokens or manifest.engine.max_sequences * manifest.max_tokens,
        min(manifest.engine.prefill_chunk, manifest.max_tokens),
    )


def _torch_session(bundle: Bundle) -> Session:
    from step35_trt.program import SteppedProgram
    from step35_trt.runtime.placement import check_size, said_once

    assert isinstance(bundle.program, SteppedProgram)
    with said_once():  # before anything slow
        check_size(bundle.directory, bundle.program.ranks)
        if find_spec("torch") is None:
            raise UnsupportedError(
                f"running {bundle.directory} needs torch", "pip install 'step35-trt[reference]'"
            )
    from step35_trt.runtime.programs.program_loading import open_program

    return open_program(bundle)


def load_reference(directory: Path) -> Session:
    """The torch oracle of a checkpoint, in fp32.

    Raises:
        UnsupportedError: torch is not installed.
    """
    if find_spec("torch") is None:
        raise UnsupportedError(
            "running a checkpoint directly needs torch", "pip install 'step35-trt[reference]'"
        )
    from step35_trt.checkpoint import Checkpoint
    from step35_trt.runtime.session_torch import TorchSession

    return TorchSession.of(Checkpoint.open(directory))


def load_any(name: str) -> Session:
    """A bundle where there is a manifest, else a checkpoint."""
    path = Path(name)
    if name and ((path / MANIFEST).is_file() or staging(path).is_dir()):
        return open_bundle(path)
    return load_reference(resolve_checkpoint(name))
