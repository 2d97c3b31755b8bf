"""What a CUDA graph does to work, on the CPU: operations are written down once and run again as they were."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Operation:
    """What was called, with what, and which of its flat results are exchanges and which are not arguments."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    exchanges: tuple[int, ...]
    new: tuple[tuple[int, int], ...]  # the place of each, and its identity

    @classmethod
    def of(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Self:
        found, given = _flat(result), _flat(args)
        exchanges = tuple(at for at, value in enumerate(found) if hasattr(value, "wait"))
        new = tuple(
            (at, id(value)) for at, value in enumerate(found) if not any(value is other for other in given)
        )
        return cls(func, args, kwargs, result, exchanges, new)

    def replay(self, made: dict[int, Any]) -> None:
        """Once more, on what stands for the results of operations before it."""
        kwargs = {name: _now(value, made) for name, value in self.kwargs.items()}
        again = _flat(self.func(*_now(self.args, made), **kwargs))
        for at in self.exchanges:
            _wait(again[at])
        for at, old in self.new:
            made[old] = again[at]


class Tape(TorchDispatchMode):
    """Operations with their arguments: numbers of the host are what they were when it was recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_local_scalar_dense" in str(func) or "nonzero" in str(func):
            raise RuntimeError(f"{func} waits for the device, which a recording cannot")
        result = func(*args, **(kwargs or {}))
        self.operations.append(Operation.of(func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """All of them on what the same memory holds now."""
        made: dict[int, Any] = {}
        for operation in self.operations:
            operation.replay(made)


def _now(value: Any, made: dict[int, Any]) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_now(part, made) for part in value)
    return made.get(id(value), value)


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
