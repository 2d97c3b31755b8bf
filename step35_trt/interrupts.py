"""Ctrl-C while a library works: noticed at the places where it asks, never as an exception inside it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Says whether the user wants to stop; may be called from any thread.
Stopped = Callable[[], bool]


@contextmanager
def noticed() -> Iterator[Stopped]:
    """Keep SIGINT for the end of the block, where it is raised as KeyboardInterrupt.

    A signal's Python handler runs on the main thread alone, which a library may keep busy; what the system's
    handler writes into a pipe is seen by all threads. Outside the main thread nothing is changed.

    Raises:
        KeyboardInterrupt: the user pressed Ctrl-C inside the block.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    flag = threading.Event()
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    before = signal.signal(signal.SIGINT, lambda *_: flag.set())
    outer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def stopped() -> bool:
        try:
            if signal.SIGINT in os.read(reader, 64):
                flag.set()
        except BlockingIOError:
            pass
        return flag.is_set()

    try:
        yield stopped
    finally:
        signal.set_wakeup_fd(outer)
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
        os.close(reader)
        os.close(writer)
    if flag.is_set():
        raise KeyboardInterrupt
