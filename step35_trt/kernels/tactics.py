"""How a kernel is tiled on a GPU, as data: `plugins/{plugin}/tactics/sm_{target}.json`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from step35_trt.errors import CorruptInputError, UnsupportedError
from step35_trt.kernels.variant import Constant
from step35_trt.resources import DATA

Problem = Mapping[str, int]


class Tactic(BaseModel):
    """One tiling of `kernel` for the problems that `when` admits.

    `when` gives inclusive bounds `(least, most)` of fields of a problem; a field it does not name is free.
    `constants` are the `tl.constexpr` arguments that the tiling decides; the rest follow from the model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kernel: str
    when: dict[str, tuple[int, int]] = {}
    constants: dict[str, Constant] = {}
    num_warps: int = Field(ge=1, le=16)
    num_stages: int = Field(ge=1, le=8)

    def admits(self, problem: Problem) -> bool:
        """Whether every bound holds.

        Raises:
            KeyError: `problem` lacks a field that is bounded.
        """
        return all(least <= problem[field] <= most for field, (least, most) in self.when.items())


class Tactics(BaseModel):
    """A tactics file.

    `measured` says where and when the entries were timed; absent, they follow from the hardware's figures and
    no measurement stands behind them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    measured: str | None = None
    entries: tuple[Tactic, ...]


@functools.cache
def load(plugin: str, target: int) -> Tactics:
    """The tactics of `plugin` for compute capability `target` (90 is 9.0).

    Raises:
        UnsupportedError: the plugin has no tactics for `target`.
        CorruptInputError: the file is not what `Tactics` expects.
    """
    path = DATA / "plugins" / plugin / "tactics" / f"sm_{target}.json"
    try:
        return Tactics.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        known = ", ".join(sorted(other.stem for other in path.parent.glob("sm_*.json")))
        raise UnsupportedError(f"{plugin} has no tactics for sm_{target}", f"Known: {known}.") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CorruptInputError(f"{path}: {where}: {first['msg']}") from None


def choose(entries: Sequence[Tactic], kernel: str, problem: Problem) -> Tactic:
    """The first entry of `kernel` that admits `problem`.

    Raises:
        UnsupportedError: none does.
    """
    for entry in entries:
        if entry.kernel == kernel and entry.admits(problem):
            return entry
    raise UnsupportedError(f"no tactic of {kernel} admits {dict(problem)}")
