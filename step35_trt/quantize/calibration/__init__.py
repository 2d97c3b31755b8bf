"""Calibration: what is folded into which weights and which groups are clipped, found stage by stage.

ModelOpt's `awq_lite` wants the whole model in memory and gives each linear a scale of its own, which a
runtime would have to multiply with. Here one layer passes at a time, hidden states lie on disk between
layers, routed experts are read one by one, and only scales that other weights take exactly are allowed (see
`sites`). ModelOpt supplies the quantisers and the formula of the candidates.
"""

from step35_trt.quantize.calibration.calibrate import Calibration, calibrate
from step35_trt.quantize.calibration.texts import calibration_tokens

__all__ = ["Calibration", "calibrate", "calibration_tokens"]
