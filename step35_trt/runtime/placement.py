"""Which of several processes this one is, as torchrun says it in the environment."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from step35_trt.errors import Step35Error, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Placement:
    """Rank `rank` of `size`, and the `local`th on this machine."""

    rank: int = 0
    size: int = 1
    local: int = 0

    @classmethod
    def here(cls) -> Placement:
        """This process's; alone where the environment says nothing.

        Raises:
            UsageError: it says half, or nonsense.
        """
        said = os.environ.get("WORLD_SIZE", "1")
        if said == "1":
            return cls()
        missing = [name for name in NEEDED if name not in os.environ]
        numbers = [said, os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")]
        whole = all(number.isdecimal() for number in numbers)
        if missing or not whole or int(numbers[1]) >= int(numbers[0]):
            wrong = f"{', '.join(missing)} missing" if missing else f"RANK is {numbers[1]}"
            raise UsageError(
                f"WORLD_SIZE is {said} in the environment, with {wrong}",
                "Start all processes at once with torchrun --nproc-per-node N -m step35_trt ...",
            )
        size, rank, local = map(int, numbers)
        return cls(rank, size, local)


@contextmanager
def said_once() -> Iterator[None]:
    """While what is wrong would be so for all processes: only the first says it, and all end the same way.

    Raises:
        Step35Error: as it came.
        SystemExit: in all processes but the first, with the exit code of the error.
    """
    here = Placement.here()
    try:
        yield
    except Step35Error as error:
        if here.rank:
            sys.exit(error.exit_code)
        raise


def check_size(directory: Path, ranks: int) -> None:
    """See that a bundle of `ranks` ranks has as many processes.

    Raises:
        UsageError: it has not.
    """
    here = Placement.here()
    if here.size == ranks:
        return
    start = f"torchrun --nproc-per-node {ranks} -m step35_trt" if ranks > 1 else "step35-trt"
    raise UsageError(
        f"{directory} is for {_count(ranks)}, and {_count(here.size)} started it",
        f"{start} generate {directory} --prompt TEXT",
    )


def check_alone(work: str) -> None:
    """See that this is the only process; of several only the first complains.

    Args:
        work: Why it has to be, such as `verify runs all ranks itself`.

    Raises:
        UsageError: it is not.
        SystemExit: likewise, in the other processes.
    """
    with said_once():
        if (size := Placement.here().size) > 1:
            raise UsageError(f"{work}, and {_count(size)} started it", "Start it once, without torchrun.")


def _count(processes: int) -> str:
    return f"{processes} process" + "es" * (processes > 1)
