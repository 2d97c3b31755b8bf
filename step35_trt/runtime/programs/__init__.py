"""Programs run on torch's tensors, by one process or by several."""
