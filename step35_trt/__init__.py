"""step35-trt: the deployment compiler for Step 3.5 Flash."""

__version__ = "0.1.0"
