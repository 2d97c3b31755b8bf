from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest

from step35_trt.build import build
from step35_trt.engine import EngineSpec
from step35_trt.resources import NANO
from step35_trt.runtime.decoding.generation_stats import GenerationStats
from step35_trt.runtime.decoding.sampling import SamplingParams
from step35_trt.runtime.dialogue.answer_text import complete
from step35_trt.runtime.load import load_text, open_bundle
from step35_trt.triton_repo.write import write_repository
from tests.server.served import Served, missing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Expected(NamedTuple):
    text: str
    token_ids: list[int]
    finish_reason: str | None
    log_probability: float


class Offline:
    """The same bundle without a server: one request at a time."""

    def __init__(self, bundle: Path) -> None:
        self.session = open_bundle(bundle)
        text = load_text(bundle, required=True)
        assert text is not None
        self.text = text

    def answer(
        self,
        prompt: str | list[int],
        max_tokens: int,
        sampling: SamplingParams | None = None,
        stops: tuple[str, ...] = (),
    ) -> Expected:
        ids = self.text.encode(prompt) if isinstance(prompt, str) else prompt
        stats, taken = GenerationStats(), list[int]()
        pieces = complete(
            self.session,
            self.text,
            ids,
            sampling or SamplingParams(),
            max_tokens=max_tokens,
            stop_ids=self.session.config.eos_token_id,
            stop_strings=stops,
            stats=stats,
            token_ids=taken,
        )
        return Expected("".join(pieces), taken, stats.finish_reason, stats.log_probability)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := missing():
        pytest.skip(f"no server here: {reason}")
    out = tmp_path_factory.mktemp("nano") / "bundle"
    build(NANO, out, EngineSpec.load("cpu-int4"))
    return out


@pytest.fixture(scope="session")
def offline(bundle: Path) -> Offline:
    return Offline(bundle)


@pytest.fixture(scope="session")
def served(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server for all tests of a process; a test leaves it running."""
    folder = tmp_path_factory.mktemp("served")
    write_repository(bundle, folder / "repository", sequences=8)
    server = Served(folder / "repository", folder / "log")
    server.start()
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def _quiet_afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test did to the server, nothing of it goes on."""
    yield
    if "served" in request.fixturenames:
        server: Served = request.getfixturevalue("served")
        for kind in ("running", "waiting"):
            assert server.settled("step35_open_requests", kind, 0) == 0
