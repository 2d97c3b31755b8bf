"""What every stage of one calibration needs, and whether it fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from step35_trt.errors import DoesNotFitError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from step35_trt.config import Step35Config
    from step35_trt.quantize.calibration.spool import Spool
    from step35_trt.quantize.folding import TensorSource
    from step35_trt.quantize.formats import Coding

# From a parameter's name and shape to how it will be stored.
CodingOf = Callable[[str, tuple[int, ...]], "Coding"]

SEARCH_TOKENS = 512  # a scale is judged by the products of so many tokens
SEARCHED_EXPERTS = 32  # and a scale that all experts share by those of so many experts
DEFAULT_CHUNK = 2048  # tokens


@dataclass(frozen=True)
class Setup:
    """One calibration.

    Attributes:
        source: The checkpoint.
        coding: How each parameter will be stored.
        token_ids: `[sequences, length]`.
        spool: Where hidden states lie.
        device: Where products are computed.
        search: Whether scales and clipping are searched; else weights are rounded to nearest.
        fp8_activations: Whether products with FP8 weights round their input to FP8, one scale a token.
        min_expert_tokens: Fewer make an expert fall back.
        chunk: Tokens that pass through a block at a time, at least one sequence.
    """

    source: TensorSource
    coding: CodingOf
    token_ids: Tensor
    spool: Spool
    device: torch.device
    search: bool
    fp8_activations: bool
    min_expert_tokens: int
    chunk: int

    @property
    def config(self) -> Step35Config:
        """The model."""
        return self.source.config

    def coding_of(self, name: str) -> Coding:
        """How a parameter will be stored."""
        return self.coding(name, self.source.shape(name))


def chunk_tokens(config: Step35Config, sequences: int, length: int, budget: int | None) -> int:
    """How many tokens may pass through a block at a time.

    Args:
        config: The model.
        sequences: Of the calibration.
        length: Of each.
        budget: Bytes of address space for the whole process; None: no limit.

    Raises:
        DoesNotFitError: not even one sequence fits.
    """
    if budget is None:
        return max(length, DEFAULT_CHUNK)
    d, heads = config.hidden_size, config.attention_other_setting.num_attention_heads
    q = max(heads, config.num_attention_heads) * config.head_dim
    wide = max(config.intermediate_size, config.share_expert_dim)
    # States and two copies are mapped whole; five of the largest matrix are there while it is quantised.
    states = 4 * sequences * length * d * 4
    matrices = 5 * 4 * max(q * d, wide * d, 2 * d * d)
    stack = 2 * config.moe_num_experts * config.moe_intermediate_size * d if config.moe_layers_enum else 0
    mapped = max(stack, 2 * config.vocab_size * d)
    sample = 4 * SEARCH_TOKENS * (6 * d + q + 2 * wide)
    scores = 3 * 4 * heads * length * length  # of one sequence at a time
    a_token = 4 * (8 * d + 6 * q + 4 * wide)
    fixed = _address_space() + states + matrices + mapped + sample + scores
    if fixed + length * a_token > budget:
        raise DoesNotFitError(
            f"calibrating on {sequences} sequences of {length} tokens needs "
            f"{(fixed + length * a_token) / 2**30:.1f} GiB and {budget / 2**30:.1f} GiB are allowed",
            "Allow more, or calibrate on fewer or shorter sequences.",
        )
    fitting = (budget - fixed) // a_token
    return min(max(length, DEFAULT_CHUNK), fitting)


def _address_space() -> int:
    """Bytes this process has mapped already: mostly libraries."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmSize"))


def stride(tokens: int) -> int:
    """Every how many tokens one is kept for searches."""
    return max(1, math.ceil(tokens / SEARCH_TOKENS))
