"""How each back end spells the vocabulary of `step35_trt.ops`."""
