"""What quantising did to a model, as data, on a terminal and as one HTML page.

`write.write_report` makes `reports/quantization.json` and `.html` inside a converted checkpoint from the two
checkpoints, what a calibration found and, where it is wanted, held-out text.
"""
