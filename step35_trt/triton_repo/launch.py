"""Starting a server: finds a `tritonserver` and gives it what it needs."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files, version
from pathlib import Path
from typing import TYPE_CHECKING

from step35_trt.errors import UnsupportedError, UsageError
from step35_trt.resources import cache_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

WHEEL = "nvidia-pytriton"


@dataclass(frozen=True)
class Server:
    """A server that can be started.

    Attributes:
        program: The binary.
        backends: Value of `--backend-directory`; None: the server knows.
        libraries: Folders that its parts are linked against.
    """

    program: Path
    backends: Path | None = None
    libraries: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Ports:
    """Where it listens."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002


def find_server() -> Server:
    """The server of a container or, without one, of the wheel `nvidia-pytriton` in this environment.

    Raises:
        UnsupportedError: there is none, or the environment does not suit it.
    """
    if found := shutil.which("tritonserver"):
        return Server(Path(found))
    try:
        release = version(WHEEL)
    except PackageNotFoundError:
        raise UnsupportedError("there is no tritonserver here", f"pip install {WHEEL}") from None
    import numpy as np

    if int(np.__version__.split(".")[0]) > 1:
        raise UnsupportedError(
            f"the server of {WHEEL} {release} hands arrays to numpy 1 only, not to {np.__version__}",
            "Give the server an environment of its own: pip install 'step35-trt[triton-server]'.",
        )
    root = _folder("pytriton/tritonserver/bin/tritonserver").parent.parent
    return Server(
        program=root / "bin" / "tritonserver",
        backends=_backends(root, release),
        libraries=(_folder("pytriton/__init__.py").parent.parent / "nvidia_pytriton.libs", _libpython()),
    )


def command(
    server: Server, repository: Path, ports: Ports, address: str, extra: Sequence[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment that start a server.

    Args:
        server: See `find_server`.
        repository: The model repository.
        ports: Where to listen.
        address: On which interface.
        extra: Further arguments.

    Raises:
        UsageError: the directory is no model repository.
    """
    if not any(repository.glob("*/config.pbtxt")):
        raise UsageError(f"{repository} is no model repository", "step35-trt triton-repo writes one.")
    arguments = [str(server.program), "--model-repository", str(repository)]
    for kind, port in (("http", ports.http), ("grpc", ports.grpc), ("metrics", ports.metrics)):
        arguments += [f"--{kind}-address", address, f"--{kind}-port", str(port)]
    if server.backends is not None:
        arguments += ["--backend-directory", str(server.backends)]
    environment = dict(os.environ)
    # The backend's stub embeds an interpreter and takes the environment of the first python3 of the PATH.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    libraries = [str(folder) for folder in server.libraries]
    if libraries:
        known = environment.get("LD_LIBRARY_PATH")
        environment["LD_LIBRARY_PATH"] = os.pathsep.join([*libraries, *([known] if known else [])])
    return [*arguments, *extra], environment


def _folder(file: str) -> Path:
    for part in files(WHEEL) or ():
        if str(part) == file:
            return Path(str(part.locate())).resolve()
    raise UnsupportedError(f"{WHEEL} has no {file}", f"pip install --force-reinstall {WHEEL}")


def _backends(root: Path, release: str) -> Path:
    """The wheel's Python backend with the stub of this interpreter's version, which it keeps apart."""
    minor = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "python_backend_stubs" / minor / "triton_python_backend_stub"
    if not stub.is_file():
        raise UnsupportedError(f"{WHEEL} {release} has no Python backend for Python {minor}")
    folder = cache_folder() / f"triton-{release}-{minor}" / "python"
    folder.mkdir(parents=True, exist_ok=True)
    for source in (*(root / "backends" / "python").iterdir(), stub):
        target = folder / source.name
        if target.is_symlink() and target.resolve() == source.resolve():
            continue
        link = folder / f".{source.name}.{os.getpid()}"
        link.symlink_to(source)
        os.replace(link, target)
    return folder.parent


def _libpython() -> Path:
    folder, name = (sysconfig.get_config_var(key) for key in ("LIBDIR", "INSTSONAME"))
    if not (folder and name and (Path(folder) / name).is_file()):
        raise UnsupportedError(
            "this Python has no shared library, which Triton's Python backend embeds",
            "Use one built with --enable-shared, such as a distribution's with its libpython package.",
        )
    return Path(folder)
