"""What one device of an engine holds while it runs: weights, caches, buffers, and what it leaves alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from step35_trt.errors import UsageError
from step35_trt.plan import weight_cost
from step35_trt.plan.parameters import MTP_GROUPS, Group, parameters
from step35_trt.plan.splits import Shares
from step35_trt.quantize.recipe import Recipe
from step35_trt.runtime.cache.cache_extent import Extent

if TYPE_CHECKING:
    from step35_trt.config import LayerSpec, Step35Config
    from step35_trt.engine import EngineSpec
    from step35_trt.hardware import Hardware
    from step35_trt.plan.weight_cost import CostOf

WORKSPACE_FORMULA = (
    "tokens of a call x the widest layer's buffers (residual and normed hidden; q, k, v, gate and output of "
    "attention, or gate, up and product of a dense MLP, or the same of the top experts with the router's "
    "fp32 logits) in the activations' type + fp32 logits of every token that may be verified; "
    "tokens of a call = max(prefill chunk, sequences x (drafts + 1))"
)


@dataclass(frozen=True)
class GroupBytes:
    """Stored bytes of a group: in all, and on one device."""

    group: Group
    nbytes: int
    on_device: int


@dataclass(frozen=True)
class Item:
    """A line of the memory table: what, and bytes on one device."""

    what: str
    nbytes: int


@dataclass(frozen=True)
class Memory:
    """One device's memory: what is in it, and what is there."""

    items: tuple[Item, ...]
    capacity: int

    @property
    def needed(self) -> int:
        """Bytes of all items."""
        return sum(item.nbytes for item in self.items)

    @property
    def free(self) -> int:
        """Bytes left; negative where it does not fit."""
        return self.capacity - self.needed


@dataclass(frozen=True)
class Footprint:
    """The memory of an engine as a function of its limits.

    Attributes:
        config: The model.
        spec: The engine.
        hardware: The engine's, which is known.
        cost_of: What each tensor costs.
        shares: What a device holds.
        weights: By group.
        kv_bytes: Of one number in a KV cache.
        activation_bytes: Of one number between operations.
    """

    config: Step35Config
    spec: EngineSpec
    hardware: Hardware
    cost_of: CostOf
    shares: Shares
    weights: tuple[GroupBytes, ...]
    kv_bytes: int
    activation_bytes: int

    @classmethod
    def of(
        cls, config: Step35Config, spec: EngineSpec, cost_of: CostOf, shares: Shares, kv_bytes: int
    ) -> Footprint:
        """The footprint of an engine whose tensors cost what is given.

        Raises:
            UsageError: the engine names no hardware.
        """
        if spec.hardware is None:
            raise UsageError(f"engine {spec.name} names no hardware to plan for")
        weights, activation_bytes = weigh(config, cost_of, shares), 4 if spec.target == "cpu" else 2
        return cls(config, spec, spec.hardware, cost_of, shares, weights, kv_bytes, activation_bytes)

    @classmethod
    def of_engine(cls, config: Step35Config, spec: EngineSpec) -> Footprint:
        """The footprint of an engine by its recipe and parallelism.

        Raises:
            UsageError: the engine names no hardware, or a recipe that there is not.
        """
        recipe = Recipe.load(spec.recipe)
        cost_of = weight_cost.of_recipe(recipe, cpu=spec.target == "cpu")
        shares = Shares.of(config, spec.parallelism, spec.devices, cost_of)
        return cls.of(config, spec, cost_of, shares, weight_cost.kv_value_bytes(recipe))

    def at(self, context: int, sequences: int, drafts: int, cached: int | None = None) -> Memory:
        """Memory of one device.

        Args:
            context: Tokens of a sequence at most.
            sequences: How many.
            drafts: MTP modules that draft.
            cached: Tokens of all sequences together (absent: all of the greatest length).
        """
        modules = self.config.mtp_layers[:drafts]
        decoder = sum(w.on_device for w in self.weights if w.group not in MTP_GROUPS)
        all_modules = sum(w.on_device for w in self.weights if w.group in MTP_GROUPS)
        share = drafts / len(self.config.mtp_layers) if modules else 0.0
        items = [
            Item("weights", decoder),
            Item(f"MTP modules ({drafts})", round(all_modules * share)),
            Item("KV cache", self.caches(self.config.layers, context, sequences, cached)),
            Item("KV cache of the MTP modules", self.caches(modules, context, sequences, cached)),
            Item("workspace", self.workspace(sequences, drafts)),
            *(Item(what, nbytes) for what, nbytes in self.hardware.reserved.items()),
        ]
        return Memory(tuple(items), self.hardware.memory)

    def kv(self, layers: tuple[LayerSpec, ...], context: int, sequences: int) -> int:
        """Bytes of keys and values that sequences see, on one device (specification 7.1)."""
        rows = kv_bytes(layers, context, self.kv_bytes)
        return math.ceil(sequences * rows * self.shares.kv)

    def caches(
        self, layers: tuple[LayerSpec, ...], context: int, sequences: int, cached: int | None = None
    ) -> int:
        """Bytes that are held for keys and values on one device; a GPU takes its pages when it starts."""
        if self.spec.target in ("cpu", "torch"):
            return self.kv(layers, context, sequences)
        extent = Extent(sequences, context, min(self.spec.prefill_chunk, context), cached)
        return math.ceil(extent.nbytes(layers, self.kv_bytes) * self.shares.kv)

    def workspace(self, sequences: int, drafts: int) -> int:
        """Bytes between operations, see `WORKSPACE_FORMULA`."""
        c = self.config
        verified = sequences * (drafts + 1)
        tokens = max(self.spec.prefill_chunk, verified)
        widest = max(
            *(2 * (a.query_heads + a.kv_heads) * a.head_dim + a.query_heads for a in c.layers),
            3 * c.intermediate_size,
            3 * c.moe_top_k * c.moe_intermediate_size + c.moe_num_experts * 4 // self.activation_bytes,
        )
        return tokens * (2 * c.hidden_size + widest) * self.activation_bytes + verified * c.vocab_size * 4


def weigh(config: Step35Config, cost_of: CostOf, shares: Shares) -> tuple[GroupBytes, ...]:
    """Stored bytes of every group, in the model's order."""
    whole: dict[Group, int] = {}
    device: dict[Group, float] = {}
    for parameter in parameters(config):
        nbytes = cost_of(parameter).nbytes(parameter.shape)
        whole[parameter.group] = whole.get(parameter.group, 0) + nbytes
        part = nbytes * shares.of_parameter(parameter)
        device[parameter.group] = device.get(parameter.group, 0.0) + part
    return tuple(GroupBytes(group, whole[group], math.ceil(device[group])) for group in whole)


def kv_bytes(layers: tuple[LayerSpec, ...], context: int, value_bytes: int) -> int:
    """Bytes of the keys and values of one sequence of `context` tokens."""
    return sum(
        2 * layer.kv_heads * layer.head_dim * value_bytes * min(context, layer.window or context)
        for layer in layers
    )
