"""Requests through a host, without a server: what is sent, when, and what a client that goes leaves."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from step35_trt.build import build
from step35_trt.engine import EngineSpec
from step35_trt.errors import Step35Error, UsageError
from step35_trt.resources import NANO
from step35_trt.runtime.decoding.generate import generate
from step35_trt.runtime.decoding.sampling import SamplingParams
from step35_trt.runtime.dialogue.text import Text
from step35_trt.runtime.load import open_bundle
from step35_trt.runtime.scheduling.requests import Limits
from step35_trt.runtime.scheduling.serving import ServingLoop
from step35_trt.triton_repo.answers import CancelledError, TimedOutError
from step35_trt.triton_repo.host import Arrival, Host
from step35_trt.triton_repo.limits import ServingLimits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from step35_trt.runtime.scheduling.requests import Metrics
    from step35_trt.runtime.session import Session

PROMPT = "def read(self, size=-1):"


class Client:
    """Keeps what it is sent; notices what a server would die of."""

    def __init__(self, *, breaks: bool = False, text: bool = True) -> None:
        self.reads_text = text
        self.sent: list[dict[str, Any]] = []
        self.error: Step35Error | None = None
        self.over = threading.Event()
        self.gone = False
        self.breaks = breaks
        self.asked_too_late = False

    def send(self, outputs: dict[str, Any], *, last: bool) -> None:
        assert not self.over.is_set()
        if self.breaks:
            raise OSError("the pipe is broken")
        self.sent.append(outputs)
        if last:
            self.over.set()

    def fail(self, error: Step35Error) -> None:
        assert not self.over.is_set()
        self.error = error
        self.over.set()

    def wants(self, output: str) -> bool:
        return self.reads_text or output != "text_output"

    def cancelled(self) -> bool:
        self.asked_too_late |= self.over.is_set()
        return self.gone

    @property
    def ids(self) -> list[int]:
        return [int(i) for outputs in self.sent for i in outputs["output_ids"].ravel()]

    @property
    def text(self) -> str:
        return b"".join(outputs["text_output"].item() for outputs in self.sent).decode()


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    out = tmp_path_factory.mktemp("nano") / "bundle"
    build(NANO, out, EngineSpec.load("cpu-int4"))
    return open_bundle(out)


@pytest.fixture(scope="module")
def text() -> Text:
    return Text.load(NANO)


class Served:
    def __init__(self, session: Session, text: Text, **limits: int) -> None:
        self.reports: list[Metrics] = []
        chosen = ServingLimits.of(session.max_tokens, 4).model_copy(update=limits)
        self.loop = ServingLoop(session, Limits(sequences=chosen.sequences))
        self.host = Host(self.loop, text, session.config.eos_token_id, chosen, self.reports.append)

    def ask(self, client: Client | None = None, timeout: int = 0, **inputs: Any) -> Client:
        client = client or Client()
        self.host.submit([arrival(client, timeout, **inputs)])
        return client


def arrival(client: Client, timeout: int = 0, **inputs: Any) -> Arrival:
    arrays = {name: np.array([[value]]) for name, value in inputs.items() if name != "prompt"}
    arrays["text_input"] = np.array([[inputs.get("prompt", PROMPT).encode()]], dtype=object)
    return Arrival(arrays, {}, timeout, client)


@pytest.fixture
def served(session: Session, text: Text) -> Iterator[Served]:
    served = Served(session, text)
    yield served
    served.host.stop()


def expected(session: Session, text: Text, prompt: str, count: int) -> list[int]:
    chunks = generate(
        session,
        text.encode(prompt),
        SamplingParams(),
        max_tokens=count,
        stop_ids=session.config.eos_token_id,
    )
    return [token for chunk in chunks for token in chunk]


def test_one_response_or_many_say_the_same(session: Session, text: Text) -> None:
    ids = expected(session, text, PROMPT, 40)
    served = Served(session, text)
    whole, pieces = served.ask(max_tokens=40), served.ask(max_tokens=40, stream=True)
    assert whole.over.wait(30)
    assert pieces.over.wait(30)
    served.host.stop()
    assert whole.ids == pieces.ids == ids
    assert whole.text == pieces.text == text.decode(ids)
    assert len(whole.sent) == 1 < len(pieces.sent)
    assert whole.sent[0]["output_ids"].shape == (1, 1, len(ids))
    assert not whole.asked_too_late
    assert not pieces.asked_too_late


def test_more_requests_than_room_are_all_answered(session: Session, text: Text) -> None:
    prompts = [f"class A{i}:" for i in range(30)]
    ids = [expected(session, text, prompt, 9) for prompt in prompts]
    served = Served(session, text, sequences=3, ahead=1)
    clients = [served.ask(prompt=prompt, max_tokens=9, stream=i % 2 == 0) for i, prompt in enumerate(prompts)]
    assert all(client.over.wait(30) for client in clients)
    served.host.stop()
    assert [client.ids for client in clients] == ids
    assert served.reports[-1].finished == 30
    assert served.reports[-1].generated_tokens == sum(map(len, ids))


def test_no_room_makes_the_server_wait(session: Session, text: Text) -> None:
    served = Served(session, text, sequences=1, ahead=0)
    client = served.ask(max_tokens=1000, end_id=-1, stream=True)
    waiting = threading.Thread(target=served.ask, kwargs={"max_tokens": 1})
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    client.gone = True
    waiting.join(10)
    assert not waiting.is_alive()
    served.host.stop()


def test_who_waits_for_room_may_run_out_of_time_or_leave(session: Session, text: Text) -> None:
    ids = expected(session, text, PROMPT, 5)
    served = Served(session, text, sequences=1, ahead=0)
    blocker = served.ask(max_tokens=1500, end_id=-1, stream=True)
    late, gone, bad, patient = Client(), Client(), Client(), Client()
    gone.gone = True
    together = [
        arrival(patient, max_tokens=5),
        arrival(late, 60_000, max_tokens=5),
        arrival(gone, max_tokens=5),
        arrival(bad, max_tokens=-5),
    ]
    waiting = threading.Thread(target=served.host.submit, args=[together])
    waiting.start()
    assert late.over.wait(10)
    assert isinstance(late.error, TimedOutError)
    assert gone.over.wait(10)
    assert isinstance(gone.error, CancelledError)
    assert isinstance(bad.error, UsageError)
    assert not patient.over.is_set()
    blocker.gone = True
    assert patient.over.wait(10)
    waiting.join(10)
    assert patient.ids == ids
    served.host.stop()


def test_text_is_decoded_for_those_who_read_it(session: Session, text: Text) -> None:
    served = Served(session, text)
    reader, other = served.ask(max_tokens=12), served.ask(Client(text=False), max_tokens=12)
    assert reader.over.wait(10)
    assert other.over.wait(10)
    served.host.stop()
    assert reader.ids == other.ids
    assert reader.text == text.decode(reader.ids)
    assert "text_output" not in other.sent[0]


def test_a_client_that_goes_frees_its_sequence(served: Served) -> None:
    client = served.ask(max_tokens=1500, end_id=-1, stream=True)
    while not client.sent:
        time.sleep(0.001)
    client.gone = True
    assert client.over.wait(5)
    assert isinstance(client.error, CancelledError)
    assert served.loop.metrics().running == 0
    assert len(client.ids) < 1500


def test_a_client_whose_responses_cannot_be_sent_is_given_up(served: Served) -> None:
    broken = served.ask(Client(breaks=True), max_tokens=1500, end_id=-1, stream=True)
    assert served.ask(max_tokens=5).over.wait(10)
    deadline = time.monotonic() + 10
    while served.loop.metrics().running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert served.loop.metrics().running == 0
    assert not broken.sent


def test_time_and_stop_words_end_a_request(served: Served, session: Session, text: Text) -> None:
    late = served.ask(timeout=50_000, max_tokens=1500, end_id=-1)
    assert late.over.wait(5)
    assert isinstance(late.error, TimedOutError)
    answer = Client()
    arrays = {
        "text_input": np.array([[PROMPT.encode()]], dtype=object),
        "stop_words": np.array([[b"the"]], dtype=object),
        "max_tokens": np.array([[60]]),
    }
    served.host.submit([Arrival(arrays, {}, 0, answer)])
    assert answer.over.wait(10)
    assert answer.sent[-1]["finish_reason"].item() == b"stop"
    assert "the" not in answer.text
    assert answer.text


def test_an_error_goes_to_its_client_and_to_nobody_else(served: Served) -> None:
    good, bad = served.ask(max_tokens=9), served.ask(max_tokens=-9)
    assert isinstance(bad.error, UsageError)
    assert good.over.wait(10)
    assert good.error is None
    out_of_vocabulary = Client()
    served.host.submit([Arrival({"input_ids": np.array([[10**6]])}, {}, 0, out_of_vocabulary)])
    assert out_of_vocabulary.over.wait(10)
    assert isinstance(out_of_vocabulary.error, UsageError)


def test_stopping_ends_every_request_with_an_error(session: Session, text: Text) -> None:
    served = Served(session, text)
    clients = [served.ask(max_tokens=1500, end_id=-1) for _ in range(3)]
    served.host.stop()
    assert all(client.over.is_set() and client.error for client in clients)
    assert isinstance(served.ask(max_tokens=3).error, Step35Error)
