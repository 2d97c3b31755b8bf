"""A Triton model repository: written from a bundle, and what its Python-backend model runs."""
