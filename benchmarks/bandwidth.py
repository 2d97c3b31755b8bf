"""How fast this machine reads memory: the denominator of every ratio for a memory-bound step."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

LINE = 64


class Reader:
    """One thread a core reads its share of a large array.

    It is C (`bandwidth.c`), since what numpy reads is less than the machine can.
    """

    def __init__(self, megabytes: int = 1024) -> None:
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "bandwidth.so"
            source = Path(__file__).with_name("bandwidth.c")
            command = [sys.executable, "-m", "ziglang", "cc", "-O3", "-march=native", "-shared", "-fPIC"]
            subprocess.run([*command, "-o", str(library), str(source)], check=True, capture_output=True)
            self._read = ctypes.CDLL(str(library)).read_lines
        self._read.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        memory = mmap.mmap(-1, megabytes << 20)
        memory.madvise(mmap.MADV_HUGEPAGE)  # fewer page walks: the memory's speed, not the page table's
        self._data = np.frombuffer(memory, np.int64)
        self._data[:] = 1

    def rate(self) -> float:
        """Bytes/s of one reading of all of it."""
        cores = os.cpu_count() or 1
        lines = self._data.nbytes // LINE // cores
        threads = [
            threading.Thread(target=self._read, args=(self._data.ctypes.data + core * lines * LINE, lines))
            for core in range(cores)
        ]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return cores * lines * LINE / (time.perf_counter() - started)


if __name__ == "__main__":
    reader = Reader()
    print(f"{max(reader.rate() for _ in range(20)) / 1e9:.1f} GB/s at best of 20 readings")
