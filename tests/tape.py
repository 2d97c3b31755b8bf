"""What a CUDA graph does to work, on the CPU: operations are written down once and run again as they were."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from collections.abc import Callable


class Tape(TorchDispatchMode):
    """Operations with their arguments: numbers of the host are what they were when it was recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_local_scalar_dense" in str(func) or "nonzero" in str(func):
            raise RuntimeError(f"{func} waits for the device, which a recording cannot")
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """All of them on what the same memory holds now."""
        made: dict[int, Any] = {}

        def now(value: Any) -> Any:
            return made.get(id(value), value)

        for func, args, kwargs, result in self.operations:
            again = func(*tree_map(now, args), **tree_map(now, kwargs))
            for work in (value for value in _flat(again) if hasattr(value, "wait")):
                _wait(work)
            for old, new in zip(_flat(result), _flat(again), strict=True):
                if not any(old is argument for argument in _flat(args)):
                    made[id(old)] = new


def _wait(exchange: Any) -> None:
    """A device's next operation waits by itself, and for those who have ended it waits for ever."""
    try:
        exchange.wait()
    except RuntimeError:
        threading.Event().wait()


def _flat(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [item for part in value for item in _flat(part)]
    return [value]


class TapeRecorder:
    """`recording.Recorder`; counts what it recorded and what was replayed."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0
        self.tapes: list[Tape] = []

    def __call__(self, work: Callable[[], object]) -> Callable[[], None]:
        work()  # as before a capture: what is kept from then on is made now
        tape = Tape()
        with tape:
            work()
        self.recorded += 1
        self.tapes.append(tape)

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return replay
