"""Weights as they come back from their codes, by ModelOpt's quantisers, on any device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from step35_trt.quantize.folding import CLIP_RATIOS

if TYPE_CHECKING:
    from torch import Tensor

    from step35_trt.quantize.formats import Coding


def fake_quantise(weight: Tensor, coding: Coding, clip: Tensor | None = None) -> Tensor:
    """`decode(encode(weight))`.

    Args:
        weight: fp32 `[N, K]`; for square blocks, all rows of some blocks.
        coding: How it will be stored.
        clip: uint8 `[N, K / block]` into `CLIP_RATIOS`, for integer codings; None clips nothing.
    """
    if coding.kind == "fp32":
        return weight
    if coding.kind == "bf16":
        return weight.bfloat16().float()
    if coding.kind == "fp8-rows":
        return _e4m3(weight, weight.abs().amax(-1, keepdim=True))
    if coding.kind == "fp8-blocks":
        return _e4m3(weight, _block_amax(weight, coding.block))
    groups = Groups.of(weight, 4 if coding.kind == "int4" else 8, coding.block)
    ratios = 1.0 if clip is None else torch.from_numpy(CLIP_RATIOS).to(weight.device)[clip.long()][..., None]
    return groups.quantised(ratios).reshape(weight.shape)


class Groups:
    """Values that share a scale, `[..., K / block, block]`, turned so that the largest is negative.

    The largest magnitude then has the code -2^(bits-1), which has no positive partner: the step is that
    magnitude over 2^(bits-1). ModelOpt's quantiser takes the largest code's value instead, a step less.
    """

    def __init__(self, values: Tensor, signs: Tensor, steps: Tensor, bits: int) -> None:
        self.values, self.signs, self.steps, self.bits = values, signs, steps, bits

    @classmethod
    def of(cls, weight: Tensor, bits: int, block: int) -> Groups:
        """Cut `[..., K]`, K a multiple of `block`."""
        values = weight.reshape(*weight.shape[:-1], -1, block)
        low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
        signs = torch.where(-low > high, 1.0, -1.0)
        return cls(values * signs, signs, torch.maximum(-low, high) / (1 << (bits - 1)), bits)

    def quantised(self, ratios: Tensor | float) -> Tensor:
        """Values with the largest magnitude of each group multiplied by `ratios` before its scale is made."""
        from modelopt.torch.quantization.tensor_quant import fake_tensor_quant

        largest = self.stored_steps(ratios) * ((1 << (self.bits - 1)) - 1)
        values: Tensor = fake_tensor_quant(self.values, largest, None, self.bits, False, False)
        return values * self.signs

    def errors(self, ratio: float) -> Tensor:
        """What `quantised` would add to `values`, computed in place: a search asks many times."""
        steps = self.stored_steps(ratio).clamp(min=torch.finfo(torch.float32).tiny)
        half = 1 << (self.bits - 1)
        found = self.values * (1 / steps)
        return found.round_().clamp_(-half, half - 1).mul_(steps).sub_(self.values)

    def stored_steps(self, ratios: Tensor | float) -> Tensor:
        """Sizes of the scales as fp16 holds them."""
        return (self.steps * ratios).half().float()


def _e4m3(weight: Tensor, amax: Tensor) -> Tensor:
    from modelopt.torch.quantization.tensor_quant import fp8_eager

    values: Tensor = fp8_eager(weight, amax)
    return values


def _block_amax(weight: Tensor, block: int) -> Tensor:
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight.abs(), (0, -k % block, 0, -n % block))
    tiles = padded.reshape(-(-n // block), block, -(-k // block), block).amax((1, 3))
    return tiles.repeat_interleave(block, 0)[:n].repeat_interleave(block, 1)[:, :k]


def quantise_activations(x: Tensor) -> Tensor:
    """FP8 with one scale a token, found while running: what an FP8 product does with its input."""
    return _e4m3(x, x.abs().amax(-1, keepdim=True))
