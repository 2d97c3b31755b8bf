"""One request on its way out: events of the scheduler become responses."""

from __future__ import annotations

from collections import deque
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from step35_trt.errors import Step35Error
from step35_trt.runtime.dialogue.answer_text import AnswerText
from step35_trt.runtime.scheduling.requests import Failed, Finished, Tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from step35_trt.runtime.dialogue.text import Text
    from step35_trt.runtime.scheduling.requests import Event, RequestHandle
    from step35_trt.triton_repo.requests import Wanted

    Outputs = dict[str, NDArray[Any]]


class CancelledError(Step35Error):
    """The client has gone."""


class TimedOutError(Step35Error):
    """The request's time was up."""


class Responder(Protocol):
    """Where the responses of one request go; used by one thread at a time, and not after the last one."""

    def send(self, outputs: Outputs, *, last: bool) -> None:
        """Send tensors by name, batch dimension included."""
        ...

    def fail(self, error: Step35Error) -> None:
        """Send an error; nothing follows it."""
        ...

    def wants(self, output: str) -> bool:
        """Whether the client asked for an output."""
        ...

    def cancelled(self) -> bool:
        """Whether nobody waits for the answer any more."""
        ...


class Answer:
    """Collects what has happened since the last response, so that a slow client gets fewer, longer ones.

    `put` is the scheduler's sink and only appends; `deliver` does the work, on another thread. An answer in
    one piece is looked at before its end only for stop strings.

    Args:
        wanted: The request.
        text: The bundle's tokenizer, if it has one.
        responder: The client.
        ready: Told that `deliver` has something to do, and whether that is urgent: a first token or the end.
    """

    def __init__(
        self, wanted: Wanted, text: Text | None, responder: Responder, ready: Callable[[Answer, bool], None]
    ) -> None:
        self._wanted = wanted
        self._responder = responder
        self._ready = ready
        # Decoding an answer takes as long as the rest of its responses together.
        decoded = bool(wanted.stop_strings) or responder.wants("text_output")
        self._text = AnswerText(text, wanted.stop_strings) if text is not None and decoded else None
        self._prefix = wanted.prefix
        self._events: deque[Event] = deque()
        self._announced = False  # to be delivered, sooner or later
        self._begun = False
        self._held: list[int] = []
        self._pieces: list[str] = []
        self._lock = Lock()
        self.handle: RequestHandle | None = None
        self.over = False

    @property
    def text_stopped(self) -> bool:
        """Whether a stop string has ended the answer."""
        return self._text is not None and self._text.stopped

    def put(self, event: Event) -> None:
        """Take an event of the scheduler."""
        self._events.append(event)
        urgent = not isinstance(event, Tokens) or (self._wanted.stream and not self._begun)
        self._begun = True
        # `deliver` clears the flag before it looks into the queue, so no event stays behind unannounced.
        if urgent or (not self._announced and (self._wanted.stream or self._wanted.stop_strings)):
            self._announced = True
            self._ready(self, urgent)

    def deliver(self) -> None:
        """Send what there is to send."""
        with self._lock:
            self._announced = False
            if self.over:  # announced twice
                return
            end: Finished | Failed | None = None
            while self._events:
                event = self._events.popleft()
                if isinstance(event, Tokens):
                    self._take(event)
                else:
                    end = event
            if end is not None:
                self.over = True
                self._finish(end)
            elif self._wanted.stream and self._held:
                self._responder.send(self._outputs(), last=False)

    def watch(self) -> None:
        """Cancel the request if its client has gone."""
        # Under the lock: a server forgets a request with its last response, and must not be asked then.
        with self._lock:
            if not self.over and self.handle is not None and self._responder.cancelled():
                self.handle.cancel()

    def _take(self, event: Tokens) -> None:
        if self._text is None:
            self._held += event.token_ids
        elif not self._text.stopped:
            before = self._text.counted
            self._pieces.append(self._text.push(event.token_ids))
            self._held += event.token_ids[: self._text.counted - before]
            if self._text.stopped and self.handle is not None:
                self.handle.cancel()

    def _finish(self, end: Finished | Failed) -> None:
        if isinstance(end, Failed):
            self._responder.fail(end.error)
            return
        if self._text is not None:
            self._pieces.append(self._text.finish())
        reason = "stop" if self.text_stopped else end.reason
        if reason == "cancelled":
            self._responder.fail(CancelledError("the request was cancelled"))
        elif reason == "timeout":
            tokens = end.stats.generated_tokens
            self._responder.fail(TimedOutError(f"the request's time was up after {tokens} tokens"))
        else:
            self._responder.send(self._outputs() | self._last_outputs(end, reason), last=True)

    def _outputs(self) -> Outputs:
        """What was held back; the ids and the text of one response need not end at the same place."""
        ids, piece = self._held, self._prefix + "".join(self._pieces)
        self._held, self._pieces, self._prefix = [], [], ""
        outputs = {
            "output_ids": np.array([[ids]], dtype=np.int32).reshape(1, 1, len(ids)),
            "sequence_length": np.array([[len(ids)]], dtype=np.int32),
            "num_input_tokens": np.array([[len(self._wanted.tokens.prompt_ids)]], dtype=np.int32),
            "num_output_tokens": np.array([[len(ids)]], dtype=np.int32),
        }
        if self._text is not None:
            outputs["text_output"] = np.array([[piece.encode()]], dtype=object)
        return outputs

    def _last_outputs(self, end: Finished, reason: str) -> Outputs:
        outputs: Outputs = {"finish_reason": np.array([[reason.encode()]], dtype=object)}
        if self._wanted.log_probabilities:
            outputs["cum_log_probs"] = np.array([[end.stats.log_probability]], dtype=np.float32)
        return outputs
