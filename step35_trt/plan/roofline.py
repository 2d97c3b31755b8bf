"""How long a step takes where nothing but bandwidth and arithmetic costs time: an upper bound on speed.

A decoding step of B sequences verifies `K` drafts each, `n = B (K + 1)` tokens: it reads every dense weight
once, the experts that n tokens touch, and the keys and values of B sequences; then K modules draft. Experts
are taken to be chosen evenly and independently, the worst case: `E (1 - (1 - k / E)^n)` distinct ones
(specification 7.2). A token is drafted by module i with the acceptance given for it, so a step yields
`1 + a1 + a1 a2 + a1 a2 a3` tokens a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from step35_trt.plan.parameters import MTP_GROUPS, parameters

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from step35_trt.hardware import Arithmetic
    from step35_trt.plan.memory import Footprint

ALL_REDUCES_A_LAYER = 2  # after attention and after the feed-forward part
ALL_REDUCE_BYTES = 2  # of one number: hidden states travel in bf16


@dataclass(frozen=True)
class Traffic:
    """Bytes that one device reads in a step, by what."""

    dense: float
    experts: float
    kv: float
    drafting: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.dense + self.experts + self.kv + self.drafting


@dataclass(frozen=True)
class Step:
    """One round of drafting and verification for all sequences, projected.

    Attributes:
        sequences: At once.
        context: Tokens in each one's cache.
        drafts: Modules used, K.
        distinct_experts: Expected in a layer, on all devices together.
        traffic: Of one device.
        memory_seconds: Reading it.
        arithmetic_seconds: Multiplying.
        link_seconds: Sums over the devices.
        tokens: Expected of a sequence.
    """

    sequences: int
    context: int
    drafts: int
    distinct_experts: float
    traffic: Traffic
    memory_seconds: float
    arithmetic_seconds: float
    link_seconds: float
    tokens: float

    @property
    def seconds(self) -> float:
        """Reading and arithmetic overlap; sums over the devices wait for both."""
        return max(self.memory_seconds, self.arithmetic_seconds) + self.link_seconds

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return self.sequences * self.tokens / self.seconds


def expected_tokens(acceptance: Sequence[float], drafts: int) -> float:
    """Tokens that a round yields: the drafts accepted one after the other, and the model's own."""
    total, chain = 1.0, 1.0
    for rate in acceptance[:drafts]:
        chain *= rate
        total += chain
    return total


def distinct_experts(experts: int, top_k: int, tokens: int) -> float:
    """Experts that `tokens` tokens touch in a layer where each chooses evenly and independently."""
    return experts * (1 - (1 - top_k / experts) ** tokens)


@dataclass(frozen=True)
class Roofline:
    """The speed of an engine on its hardware; everything here is computed, nothing measured.

    Attributes:
        footprint: What a device holds.
        bandwidth: Bytes per second that are reckoned with.
        decoder_work: Multiply-adds of a token's products on one device, twice, by arithmetic.
        modules_work: The same for all MTP modules together.
    """

    footprint: Footprint
    bandwidth: float
    decoder_work: Mapping[Arithmetic, float]
    modules_work: Mapping[Arithmetic, float]

    @classmethod
    def of(cls, footprint: Footprint, bandwidth: float) -> Roofline:
        """The roofline of an engine at so many bytes per second."""
        config = footprint.config
        decoder: dict[Arithmetic, float] = {}
        modules: dict[Arithmetic, float] = {}
        for p in parameters(config):
            if p.group != "embedding" and len(p.shape) > 1:
                used = config.moe_top_k / config.moe_num_experts if p.group == "routed experts" else 1.0
                work, kind = modules if p.group in MTP_GROUPS else decoder, footprint.cost_of(p).arithmetic
                amount = 2 * p.count * used * footprint.shares.of_parameter(p)
                work[kind] = work.get(kind, 0.0) + amount
        return cls(footprint, bandwidth, decoder, modules)

    def step(self, sequences: int, context: int, drafts: int, acceptance: Sequence[float]) -> Step:
        """A step of so many sequences with so many tokens each."""
        config = self.footprint.config
        tokens = sequences * (drafts + 1)
        touched = distinct_experts(config.moe_num_experts, config.moe_top_k, tokens)
        traffic = self._traffic(sequences, context, drafts, touched)
        return Step(
            sequences,
            context,
            drafts,
            touched,
            traffic,
            traffic.total / self.bandwidth,
            self._arithmetic(tokens, context, drafts),
            self._link(tokens, drafts),
            expected_tokens(acceptance, drafts),
        )

    def _traffic(self, sequences: int, context: int, drafts: int, touched: float) -> Traffic:
        config, footprint = self.footprint.config, self.footprint
        device = {w.group: w.on_device for w in footprint.weights}
        experts = device.get("routed experts", 0)
        modules = sum(device.get(group, 0) for group in MTP_GROUPS)
        used = config.mtp_layers[:drafts]
        return Traffic(
            # Looking up an embedding reads a row a token.
            dense=sum(device.values()) - experts - modules - device["embedding"],
            experts=experts * touched / config.moe_num_experts,
            kv=footprint.kv(config.layers, context, sequences),
            drafting=modules * self._modules_used(drafts) + footprint.kv(used, context, sequences),
        )

    def _arithmetic(self, tokens: int, context: int, drafts: int) -> float:
        """Seconds of multiply-adds on one device, each kind at its published rate."""
        config = self.footprint.config
        seen: Arithmetic = "fp32" if self.footprint.activation_bytes == 4 else "bf16"
        attention = sum(
            4 * layer.query_heads * layer.head_dim * min(context, layer.window or context)
            for layer in (*config.layers, *config.mtp_layers[:drafts])
        )
        parts = [
            (seen, attention * self.footprint.shares.kv),
            *self.decoder_work.items(),
            *((kind, work * self._modules_used(drafts)) for kind, work in self.modules_work.items()),
        ]
        return tokens * sum(work / self.footprint.hardware.rate(kind) for kind, work in parts)

    def _modules_used(self, drafts: int) -> float:
        return drafts / len(self.footprint.config.mtp_layers) if drafts else 0.0

    def _link(self, tokens: int, drafts: int) -> float:
        """Seconds of all-reduces at the link's bandwidth (a ring sends 2 (R - 1) / R of the bytes)."""
        shares, config, link = self.footprint.shares, self.footprint.config, self.footprint.hardware.link
        if not shares.collectives or link is None:
            return 0.0
        layers = len(config.layers) + drafts
        sent = tokens * layers * ALL_REDUCES_A_LAYER * config.hidden_size * ALL_REDUCE_BYTES
        return sent * 2 * (shares.ranks - 1) / shares.ranks / link.bandwidth
