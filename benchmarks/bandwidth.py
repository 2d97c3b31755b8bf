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


def read_bandwidth(megabytes: int = 1024, repeats: int = 20) -> float:
    """Most bytes/s seen while one thread a core reads its share of a large array.

    The reader is C (`bandwidth.c`), since what numpy reads is less than the machine can; the best of the
    repeats is the machine's, the rest its noise.
    """
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "bandwidth.so"
        source = Path(__file__).with_name("bandwidth.c")
        command = [sys.executable, "-m", "ziglang", "cc", "-O3", "-march=native", "-shared", "-fPIC"]
        subprocess.run([*command, "-o", str(library), str(source)], check=True, capture_output=True)
        reader = ctypes.CDLL(str(library)).read_lines
    reader.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    memory = mmap.mmap(-1, megabytes << 20)
    memory.madvise(mmap.MADV_HUGEPAGE)  # fewer page walks: the memory's speed, not the page table's
    data = np.frombuffer(memory, np.int64)
    data[:] = 1
    cores = os.cpu_count() or 1
    lines = data.nbytes // LINE // cores
    best = 0.0
    for _ in range(repeats):
        threads = [
            threading.Thread(target=reader, args=(data.ctypes.data + core * lines * LINE, lines))
            for core in range(cores)
        ]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = max(best, cores * lines * LINE / (time.perf_counter() - started))
    return best


if __name__ == "__main__":
    print(f"{read_bandwidth() / 1e9:.1f} GB/s")
