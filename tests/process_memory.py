"""What a process takes, measured in one of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def status(field: str) -> int:
    """Bytes of this process by the kernel's name for them.

    VmHWM is the peak of this program alone; ru_maxrss would include what the process was before exec.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def printed(program: str, *arguments: object) -> list[int]:
    """The numbers that a Python program prints."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    return [int(line) for line in done.stdout.split()]
