"""Better tactics by measuring: from a plugin's tactics, one change after another that saves time."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from step35_trt.progress import silent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from step35_trt.kernels.tactics import Tactic, Tactics
    from step35_trt.progress import Progress

Entries = tuple["Tactic", ...]
WORTH = 0.98  # a change has to save 2 %: less is the noise of a measurement
ROUNDS = 3
MOST_WARPS, MOST_STAGES = 16, 8
OPTIONS = ("num_warps", "num_stages")


class Bench(Protocol):
    """What can be measured."""

    @property
    def problems(self) -> Sequence[Mapping[str, int]]:
        """The workloads, by the fields that tactics are chosen by."""
        ...

    def compiles(self, entries: Entries, kernel: str) -> bool:
        """Whether `kernel`, with these tactics, passes its static checks."""
        ...

    def seconds(self, workload: int, entries: Entries) -> float:
        """Time of a workload; infinite where it fails or its result is wrong."""
        ...


@dataclass
class _Search:
    bench: Bench
    entries: Entries
    times: list[float]
    keep: Callable[[Entries], None]

    def improve(self, index: int) -> bool:
        """Take changes of one entry, and what has to change with it, while they pay."""
        entry = self.entries[index]
        rivals = [e for e in self.entries if e.kernel == entry.kernel]
        concerned = [
            number
            for number, problem in enumerate(self.bench.problems)
            if next((e for e in rivals if e.admits(problem)), None) is entry
        ]
        better = False
        while concerned and self._take(index, concerned):
            better = True
        return better

    def _take(self, index: int, concerned: Sequence[int]) -> bool:
        """Take the first change that pays."""
        for candidate in _changes(self.entries, index):
            if not self.bench.compiles(candidate, self.entries[index].kernel):
                continue
            times = [self.bench.seconds(number, candidate) for number in concerned]
            change = sum(_change(self.times[n], new) for new, n in zip(times, concerned, strict=True))
            if change < len(concerned) * math.log(WORTH):
                self.entries = candidate
                self.keep(candidate)
                for number, new in zip(concerned, times, strict=True):
                    self.times[number] = new
                return True
        return False


def _change(old: float, new: float) -> float:
    """The logarithm of `new / old`; what fails is worse than all else, what no longer fails better."""
    if math.isinf(new):
        return math.inf
    return -math.inf if math.isinf(old) else math.log(new / old)


def _forget(_: Entries) -> None:
    pass


def tune(
    entries: Entries,
    bench: Bench,
    progress: Progress = silent,
    keep: Callable[[Entries], None] = _forget,
) -> Entries:
    """Entries of the same bounds, at most as slow on every bench's sum of logarithms of times.

    Coordinate descent: tile sizes, warps and pipeline depth are doubled, halved or stepped, one at a time.
    `keep` is called with each improvement, so that what ends the search early ends nothing else.
    """
    times = [bench.seconds(n, entries) for n in range(len(bench.problems))]
    search = _Search(bench, entries, times, keep)
    total = ROUNDS * len(entries)
    for round_ in range(ROUNDS):
        found = False
        for index, entry in enumerate(entries):
            found |= search.improve(index)
            progress(round_ * len(entries) + index + 1, total, entry.kernel)
        if not found:
            break
    return search.entries


def _changes(entries: Entries, index: int) -> Iterator[Entries]:
    """Neighbours of the entry at `index`: alone, and with those of equal bounds that share the constant."""
    entry = entries[index]
    for warps in (entry.num_warps * 2, entry.num_warps // 2):
        if 1 <= warps <= MOST_WARPS:
            yield _with(entries, [index], num_warps=warps)
    for stages in (entry.num_stages + 1, entry.num_stages - 1):
        if 1 <= stages <= MOST_STAGES:
            yield _with(entries, [index], num_stages=stages)
    for name, value in entry.constants.items():
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        sharing = [
            i for i, e in enumerate(entries) if e.when == entry.when and e.constants.get(name) == value
        ]
        for changed in (value * 2, value // 2):
            if changed:
                yield _with(entries, [index], **{name: changed})
                if len(sharing) > 1:
                    yield _with(entries, sharing, **{name: changed})


def _with(entries: Entries, indices: Sequence[int], **values: int) -> Entries:
    options: dict[str, object] = {name: values.pop(name) for name in OPTIONS if name in values}
    return tuple(
        e.model_copy(update=options | {"constants": {**e.constants, **values}}) if i in indices else e
        for i, e in enumerate(entries)
    )


def text(found: Tactics) -> str:
    """A tactics file, an entry a line."""
    lines = [json.dumps(e.model_dump(exclude_defaults=True)) for e in found.entries]
    body = ",\n".join(f"    {line}" for line in lines)
    return f'{{\n  "measured": {json.dumps(found.measured)},\n  "entries": [\n{body}\n  ]\n}}\n'
