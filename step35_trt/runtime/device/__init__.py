"""Programs on a GPU: pages, weights, kernels, engines, recordings."""
