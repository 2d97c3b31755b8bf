from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from step35_trt.interrupts import noticed


def test_a_thread_sees_control_c_while_the_main_one_waits() -> None:
    """The main thread runs no handler before it is done waiting, which is what a library keeps it at."""
    seen: list[bool] = []
    before = signal.getsignal(signal.SIGINT)

    def waiting() -> None:
        with noticed() as stopped:

            def work() -> None:
                seen.append(stopped())
                os.kill(os.getpid(), signal.SIGINT)
                end = time.monotonic() + 5
                while not stopped() and time.monotonic() < end:
                    time.sleep(0.001)
                seen.append(stopped())

            worker = threading.Thread(target=work)
            worker.start()
            worker.join()

    with pytest.raises(KeyboardInterrupt):
        waiting()
    assert seen == [False, True]
    assert signal.getsignal(signal.SIGINT) is before


def test_nothing_happens_without_control_c() -> None:
    before = signal.getsignal(signal.SIGINT)
    with noticed() as stopped:
        assert not stopped()
    assert signal.getsignal(signal.SIGINT) is before


def test_what_is_raised_inside_comes_out() -> None:
    with pytest.raises(ValueError, match="inside"), noticed():
        raise ValueError("inside")


def test_other_threads_change_nothing() -> None:
    found: list[object] = []

    def work() -> None:
        before = signal.getsignal(signal.SIGINT)
        with noticed() as stopped:
            found.extend((signal.getsignal(signal.SIGINT) is before, stopped()))

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert found == [True, False]
