"""`generate --chat`: what a person at a terminal sees."""

from __future__ import annotations

import io
import os
import select
import sys
import time
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from step35_trt import console
from step35_trt.build import build
from step35_trt.commands import chatting
from step35_trt.engine import EngineSpec
from step35_trt.resources import NANO

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from step35_trt.runtime.decoding.generation_stats import GenerationStats


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    written = io.StringIO()
    monkeypatch.setattr(console, "out", Console(file=written, force_terminal=True, color_system="standard"))
    monkeypatch.setattr(console, "err", Console(file=io.StringIO()))
    return written


def test_reasoning_is_dimmed_and_content_is_not(screen: io.StringIO) -> None:
    def complete(stats: GenerationStats) -> Generator[str]:
        yield from ("hm", "m\n</thi", "nk>\nYes", " [bold]!\x1b[31m\x07")

    message = chatting._show(complete, reasoning=True)
    assert (message.reasoning_content, message.content) == ("hmm", "Yes [bold]!\x1b[31m\x07")
    assert screen.getvalue() == "\x1b[2mhm\x1b[0m\x1b[2mm\x1b[0m\n\nYes [bold]![31m\n"


def test_an_interrupt_keeps_what_was_said(screen: io.StringIO) -> None:
    closed = []

    def complete(stats: GenerationStats) -> Generator[str]:
        try:
            yield "One, two"
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    assert chatting._show(complete, reasoning=False).content == "One, two"
    assert closed


@pytest.mark.skipif(sys.platform == "win32", reason="a pseudo-terminal")
def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path: Path) -> None:
    import pty

    build(NANO, tmp_path / "bundle", EngineSpec.load("cpu-int4"))
    child, terminal = pty.fork()
    if child == 0:
        line = [sys.executable, "-m", "step35_trt", "generate", str(tmp_path / "bundle"), "--chat"]
        os.execv(sys.executable, line)
    seen = b""

    def until(text: bytes, pressing: bytes = b"") -> None:
        """Read up to a text, pressing a key again and again: one between a prompt and its read is lost."""
        nonlocal seen
        pressed, end = 0.0, time.monotonic() + 60
        while text not in seen:
            assert time.monotonic() < end, seen
            if pressing and time.monotonic() > pressed + 2:
                os.write(terminal, pressing)
                pressed = time.monotonic()
            if select.select([terminal], [], [], 0.1)[0]:
                seen += os.read(terminal, 4096)
        seen = seen[seen.index(text) + len(text) :]

    try:
        until(b"> ")
        os.write(terminal, b"Write a long text\n")
        until(b"long text\r\n")
        until(b" ")  # the answer has begun
        until(b"stopped", b"\x03")
        until(b"> ")
        until(b"ends the chat", b"\x03")
        until(b"> ")
        os.write(terminal, b"Go on\n")
        until(b"tokens/s")
        until(b"> ")
        os.write(terminal, b"\x04")
        assert os.waitpid(child, 0)[1] == 0
    finally:
        os.close(terminal)
