"""`python -m step35_trt`, and the command `step35-trt`."""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command line; Ctrl-C ends the process quietly while that is still being imported."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else the caller wants it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from step35_trt import cli

    signal.signal(signal.SIGINT, before)
    cli.main()


if __name__ == "__main__":
    main()
