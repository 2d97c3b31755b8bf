"""What was compiled, run without what it was compiled for: networks in numpy, kernels as defined."""
