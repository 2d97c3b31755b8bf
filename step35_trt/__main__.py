"""`python -m step35_trt`."""

from step35_trt.cli import main

main()
