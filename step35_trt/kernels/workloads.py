"""Problems on which kernels are checked, timed and tuned: what one layer does in one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from step35_trt.config import Step35Config
from step35_trt.kernels.catalogue import PLUGINS
from step35_trt.resources import PUBLISHED

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from torch import Tensor

    from step35_trt.kernels.tactics import Tactic

Bound = Literal["bandwidth", "launch", "attention", "matmul"]


@dataclass(frozen=True)
class ExpertsCall:
    """Tokens whose experts are chosen.

    Attributes:
        x: `[t, D]` bf16.
        ids: `[t, k]` int32.
        mix: `[t, k]` fp32.
        weights: `sparse_moe.weights.ExpertWeights`.
        geometry: `sparse_moe.geometry.Geometry`.
        limit: Of the clamp.
    """

    x: Tensor
    ids: Tensor
    mix: Tensor
    weights: Any
    geometry: Any
    limit: float


@dataclass(frozen=True)
class Workload:
    """One call of a plugin, with its inputs in place.

    Attributes:
        plugin: Whose kernels run.
        name: What is done, for people.
        problem: The fields that tactics are chosen by.
        bound: What limits it at best: reading bytes, starting kernels, torch's own attention, or multiplying.
        run: The call, with tactics; the same tensors each time.
        definition: The same in fp32, of the output's leading rows (as many as it returns).
        plain: The same in plain torch at the activations' type.
        alone: Some rows of `run`, and the same rows where nothing shares their batch.
        tolerance: Largest error of `run`, relative to the definition's largest magnitude.
        bytes: That must be read or written.
        operations: Multiplications and additions.
        experts: What another implementation of the experts is given; None for attention.
    """

    plugin: str
    name: str
    problem: Mapping[str, int]
    bound: Bound
    run: Callable[[Sequence[Tactic]], Tensor]
    definition: Callable[[], Tensor]
    plain: Callable[[], Tensor]
    alone: Callable[[Sequence[Tactic]], tuple[Tensor, Tensor]]
    tolerance: float
    bytes: int
    operations: int
    experts: ExpertsCall | None = None


@dataclass(frozen=True)
class Scale:
    """How large workloads are.

    Attributes:
        config: The model.
        tokens: Numbers of tokens for the experts.
        experts: How many there are in a layer; fewer than the model's fit a small machine.
        contexts: Tokens in the caches.
        batches: Sequences that are decoded together.
        prefill: Tokens of one prefill.
    """

    config: Step35Config
    tokens: tuple[int, ...]
    experts: int
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    prefill: int


def published() -> Scale:
    """The model's own widths: what figures are quoted for."""
    config = Step35Config.load(PUBLISHED)
    return Scale(config, (1, 4, 8, 64, 4096), config.moe_num_experts, (32768, 262144), (1, 16), 8192)


def small() -> Scale:
    """Widths that an interpreter finishes in seconds: they prove the code, and say nothing of speed."""
    config = Step35Config.load(PUBLISHED).model_copy(
        update={
            "hidden_size": 128,
            "moe_intermediate_size": 128,
            "moe_num_experts": 6,
            "moe_top_k": 2,
            "num_attention_heads": 8,
            "num_attention_groups": 1,
            "head_dim": 16,
            "sliding_window": 20,
        }
    )
    window = config.attention_other_setting.model_copy(
        update={"num_attention_heads": 12, "num_attention_groups": 1, "head_dim": 16}
    )
    config = config.model_copy(update={"attention_other_setting": window})
    return Scale(config, (1, 3, 20), 6, (70,), (1, 3), 40)


def workloads(
    scale: Scale, device: torch.device, plugins: Sequence[str] = PLUGINS
) -> list[Callable[[], Workload]]:
    """Makers of the plugins' workloads; each takes its memory when it is called."""
    from step35_trt.kernels.attention_workloads import makers as attention
    from step35_trt.kernels.moe_workloads import makers as experts

    every = {"gated_attention": attention, "sparse_moe": experts}
    return [make for name in plugins for make in every[name](scale, device)]
