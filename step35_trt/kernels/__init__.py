"""Our Triton kernels: where they are loaded, compiled ahead of time, checked and tuned."""
