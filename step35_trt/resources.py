"""The data that ships with the package: recipes, engine specs, plugins."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from step35_trt.errors import UsageError

_PACKAGE = Path(__file__).parent
# In a wheel the top-level folders lie inside the package; in a checkout, beside it.
DATA = _PACKAGE / "_data" if (_PACKAGE / "_data").is_dir() else _PACKAGE.parent
NANO = _PACKAGE / "nano"
PUBLISHED = _PACKAGE / "published"  # config.json of Step 3.5 Flash (specification 1.1), without its weights

M = TypeVar("M", bound=BaseModel)


def load_yaml(model: type[M], folder: str, name: str) -> M:
    """Read `folder/name.yaml` of the package, or the file `name` where it is a path to one.

    Raises:
        UsageError: no such file, or its content is not what `model` expects.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else DATA / folder / f"{name}.yaml"
    try:
        raw: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        return model.model_validate(raw)
    except FileNotFoundError:
        raise UsageError(
            f"there is no {path.name} in {folder}/", f"Known: {', '.join(known(folder))}."
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{path}: {where + ': ' if where else ''}{first['msg']}") from None


def known(folder: str) -> list[str]:
    """Names of the shipped files of a folder."""
    return sorted(path.stem for path in (DATA / folder).glob("*.yaml"))


def cache_folder() -> Path:
    """Where compiled code is kept between runs: `step35-trt` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "step35-trt"
