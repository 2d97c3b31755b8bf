"""How fast this machine reads memory: the denominator of every ratio for a memory-bound step."""

from __future__ import annotations

import os
import threading
import time

import numpy as np


def read_bandwidth(megabytes: int = 1024, repeats: int = 15) -> float:
    """Most bytes/s seen while one thread a core takes the maximum of its share of a large array.

    The reduction is a plain stream of loads; the best of the repeats is the machine's, the rest its noise.
    """
    data = np.ones(megabytes << 17, np.int64)
    parts = np.array_split(data, os.cpu_count() or 1)
    best = 0.0
    for _ in range(repeats):
        threads = [threading.Thread(target=part.max) for part in parts]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = max(best, data.nbytes / (time.perf_counter() - started))
    return best


if __name__ == "__main__":
    print(f"{read_bandwidth() / 1e9:.1f} GB/s")
