"""A batch over a Ray cluster: workers answer, one driver reads and writes, in order and each line once.

Only the driver touches the files. It hands lines out in portions and writes what comes back in the input's
order, so a portion whose worker has died is simply handed out again: what that worker did was never written.
At most `WINDOW` portions for each worker are out or wait to be written, whatever the input's size.
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json, to_json

from step35_trt.errors import Step35Error, UnsupportedError, UsageError
from step35_trt.runtime.batch_files.batch import run_lines, together
from step35_trt.runtime.batch_files.batch_lines import Line

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Literal

    from step35_trt.runtime.batch_files.batch import Answering, BatchSummary, Progress, Record

    Parts = list[tuple[int, bytes, bool]]

PORTION_LINES, PORTION_BYTES = 32, 1 << 20
AT_A_WORKER = 2  # portions: one being answered and one behind it, so that its batch never runs dry
WINDOW = 8  # portions for each worker between the reading and the writing
RESTART_SECONDS = 0.5  # before a worker that is being started anew is asked again
ATTEMPTS = 4  # for a portion; a line that kills every worker must not do so for ever


@dataclass(frozen=True)
class RayOptions:
    """How a cluster is used.

    Attributes:
        address: Of the cluster; 'local' starts one on this machine, 'auto' takes the one it belongs to.
        workers: Processes that load the bundle; each machine must see it under the same path.
        cpus: Cores that the cluster sets aside for each; None: an equal share of all.
        sequences: Requests that one worker runs at once.
        draft_tokens: Drafts a round.
    """

    address: str
    workers: int
    cpus: float | None = None
    sequences: int = 16
    draft_tokens: int | Literal["auto"] = "auto"


def run_batch_ray(
    bundle: Path,
    input_path: Path,
    output_path: Path,
    options: RayOptions,
    *,
    progress: Progress | None = None,
) -> BatchSummary:
    """`run_batch` over a Ray cluster, with the same files: either goes on where the other has stopped.

    Args:
        bundle: Where the workers find the bundle.
        input_path: JSON lines in OpenAI's batch format.
        output_path: Written as `run_batch` does.
        options: The cluster.
        progress: Called after every line.

    Raises:
        UsageError: a path or an option is off, or the output holds the answers of another input.
        UnsupportedError: Ray is not installed.
        Step35Error: there is no cluster, it has no room, the bundle cannot be loaded there, or a portion has
            lost its worker `ATTEMPTS` times.
        DoesNotFitError: the disk is full.
    """
    if options.workers < 1:
        raise UsageError(f"a batch needs at least one worker, not {options.workers}")
    with spread(bundle, options) as answering:
        return run_lines(answering, input_path, output_path, progress=progress)


@contextmanager
def spread(bundle: Path, options: RayOptions) -> Iterator[Answering]:
    """Something that answers lines on a cluster, whose workers end with the context.

    A process that is connected to a cluster already stays connected, whatever the address.

    Raises:
        UnsupportedError: Ray is not installed.
        Step35Error: there is no cluster, it has no room, or the bundle cannot be loaded there.
    """
    if find_spec("ray") is None:
        raise UnsupportedError("a batch over several machines needs Ray", "pip install 'step35-trt[ray]'")
    import ray

    connected = ray.is_initialized()
    if not connected:
        try:
            ray.init(address=options.address, log_to_driver=False, include_dashboard=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise Step35Error(f"there is no Ray cluster at {options.address}: {error}") from None
    try:
        with closing(_Pool(options)) as pool:
            pool.load(bundle)
            yield pool.answers
    finally:
        if not connected:
            ray.shutdown()


class Worker:
    """What runs in a worker's process: the bundle, and portions that come as bytes and go as bytes."""

    def __init__(self, bundle: str, sequences: int, draft_tokens: int | Literal["auto"]) -> None:
        from step35_trt.runtime.load import load_text, open_bundle

        session = open_bundle(Path(bundle))
        text = load_text(Path(bundle), required=True)
        assert text is not None
        self._context = together(session, text, sequences, draft_tokens)
        self._answering = self._context.__enter__()

    def ready(self) -> None:
        """Returns when the bundle is loaded."""

    def answer(self, parts: Parts) -> list[bytes]:
        """The records of some lines, as JSON."""
        return [to_json(record) for _, record in self._answering(Line(*part) for part in parts)]


@dataclass
class _Portion:
    lines: list[Line]
    attempts: int = 0
    records: list[Record] | None = None

    @property
    def parts(self) -> Parts:
        return [(line.number, line.raw, line.too_long) for line in self.lines]


class _Pool:
    """Actors, and what each of them is working on."""

    def __init__(self, options: RayOptions) -> None:
        self._options = options
        self._actors: list[Any] = []
        self._load: dict[Any, int] = {}
        self._busy: dict[Any, tuple[Any, _Portion | None]] = {}  # without a portion: being started anew

    def load(self, bundle: Path) -> None:
        """Start the workers; returns when all have the bundle."""
        import ray

        options = self._options
        cpus = options.cpus
        if cpus is None:
            cpus = int(ray.cluster_resources().get("CPU", 1)) / options.workers
            cpus = float(int(cpus)) if cpus > 1 else cpus  # Ray takes no broken number above one
        # A dead actor is started anew by Ray; its calls are handed out again here, to whoever has room.
        kind = ray.remote(max_restarts=-1, max_task_retries=0, max_concurrency=AT_A_WORKER, num_cpus=cpus)(
            Worker
        )
        for _ in range(options.workers):
            self._actors.append(kind.remote(str(bundle.resolve()), options.sequences, options.draft_tokens))
        self._load = dict.fromkeys(self._actors, 0)
        try:
            ray.get([actor.ready.remote() for actor in self._actors])
        except ray.exceptions.RayError as error:
            raise Step35Error(f"a worker cannot load {bundle}: {_reason(error)}") from None

    def close(self) -> None:
        """End the workers."""
        import ray

        for actor in self._actors:
            ray.kill(actor)

    def answers(self, lines: Iterable[Line]) -> Iterator[tuple[Line, Record]]:
        """See `Answering`."""
        source = _portions(lines)
        window: deque[_Portion] = deque()  # in the input's order
        waiting: deque[_Portion] = deque()
        exhausted = False
        while True:
            while not exhausted and len(window) < WINDOW * len(self._actors):
                if (portion := next(source, None)) is None:
                    exhausted = True
                else:
                    window.append(portion)
                    waiting.append(portion)
            if not window:
                return
            while waiting and (actor := self._free()) is not None:
                self._start(actor, waiting.popleft())
            if window[0].records is None:
                waiting.extendleft(self._collect())
                continue
            done = window.popleft()
            yield from zip(done.lines, done.records or (), strict=True)

    def _free(self) -> Any:
        actor = min(self._actors, key=self._load.__getitem__)
        return actor if self._load[actor] < AT_A_WORKER else None

    def _start(self, actor: Any, portion: _Portion) -> None:
        portion.attempts += 1
        self._busy[actor.answer.remote(portion.parts)] = actor, portion
        self._load[actor] += 1

    def _collect(self) -> list[_Portion]:
        """Wait until a portion is answered; returns those to be handed out again."""
        import ray

        lost = []
        done, _ = ray.wait(list(self._busy), num_returns=1)
        for call in done:
            actor, portion = self._busy.pop(call)
            self._load[actor] -= 1
            try:
                result = ray.get(call)
                if portion is not None:
                    portion.records = [from_json(record) for record in result]
            except ray.exceptions.RayTaskError as error:  # raised by our own code: again would be the same
                raise Step35Error(_reason(error)) from None
            except ray.exceptions.RayError as error:
                self._load[actor] += 1  # it gets nothing until it answers again
                self._busy[actor.ready.remote()] = actor, None
                if portion is None:
                    time.sleep(RESTART_SECONDS)
                    continue
                if portion.attempts == ATTEMPTS:
                    first, last = portion.lines[0].number, portion.lines[-1].number
                    raise Step35Error(
                        f"lines {first} to {last} have lost their worker {ATTEMPTS} times: {_reason(error)}",
                        "What was written before is safe; the same command goes on from there.",
                    ) from None
                lost.append(portion)
        return lost


def _portions(lines: Iterable[Line]) -> Iterator[_Portion]:
    portion: list[Line] = []
    size = 0
    for line in lines:
        portion.append(line)
        size += len(line.raw)
        if len(portion) == PORTION_LINES or size >= PORTION_BYTES:
            yield _Portion(portion)
            portion, size = [], 0
    if portion:
        yield _Portion(portion)


def _reason(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    lines = [line for line in str(cause).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(cause).__name__
