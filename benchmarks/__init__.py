"""Scripts whose figures the README quotes; each prints a ratio to a baseline of the same run."""
