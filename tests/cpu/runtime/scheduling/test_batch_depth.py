from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pytest

from step35_trt.config import Step35Config
from step35_trt.runtime.decoding.round_costs import (
    PRIOR_MODULE,
    RoundCosts,
    StepCosts,
    StepwiseCosts,
    prior_cost,
)
from step35_trt.runtime.scheduling.batch_depth import BatchDepth, Member
from step35_trt.steps import Cost
from tests.synthetic import raw_config

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CHEAP = (0.95, 0.9, 0.9)


class World:
    """Sequences whose heads are right at given rates, in rounds of given cost."""

    def __init__(
        self,
        rates: Sequence[tuple[float, ...]],
        decoder: Callable[[int], float],
        module: float = 0.01,
        whole: bool = False,  # whether rounds are measured as a whole
    ) -> None:
        self.rates, self.decoder, self.module = rates, decoder, module
        self.costs: StepwiseCosts | RoundCosts = StepwiseCosts(3, lambda tokens: 1 + 0.1 * tokens)
        if whole:
            self.costs = RoundCosts(3, lambda tokens: 1 + 0.1 * tokens)
        self.batch = BatchDepth(3, self.costs)
        self.members = [self.batch.member() for _ in rates]
        self.rng = np.random.default_rng(0)
        self.tokens = self.seconds = 0.0

    def round(self, others: int = 0) -> list[int]:
        self.batch.choose(self.members, others)
        depths = [member.choose(3) for member in self.members]
        size = others + sum(1 + depth for depth in depths)
        verifying, drafting = self.decoder(size) * self.rng.uniform(0.95, 1.05), self.module * max(depths)
        if isinstance(self.costs, RoundCosts):
            self.costs.record(size, max(depths), verifying + drafting)
        else:
            for module in range(max(depths)):
                self.costs.of(module).record(2 * sum(d > module for d in depths), self.module)
            self.costs.of(None).record(size, verifying)
        for member, depth, rates in zip(self.members, depths, self.rates, strict=True):
            accepted = 0
            while accepted < depth and self.rng.random() < rates[accepted]:
                accepted += 1
            member.record(depth, accepted, 0.0)
            self.tokens += 1 + accepted
        self.seconds += self.decoder(size) + self.module * max(depths)
        return depths

    def settled(self, rounds: int = 300) -> list[float]:
        """Mean depth of each sequence after a while."""
        history = [self.round() for _ in range(rounds)]
        return [float(mean) for mean in np.mean(history[rounds // 2 :], axis=0)]


def memory_bound(tokens: int) -> float:
    return 1 + 0.02 * tokens


def compute_bound(tokens: int) -> float:
    return 0.1 + 1.0 * tokens


@pytest.mark.parametrize("whole", [False, True])
def test_where_weights_are_read_anyway_everybody_drafts(whole: bool) -> None:
    assert all(depth > 2.4 for depth in World([CHEAP] * 8, memory_bound, whole=whole).settled())


@pytest.mark.parametrize("whole", [False, True])
def test_where_each_token_costs_its_share_nobody_does(whole: bool) -> None:
    assert all(depth < 0.6 for depth in World([(0.6, 0.5, 0.5)] * 8, compute_bound, whole=whole).settled())


def test_who_is_predicted_well_drafts_and_who_is_not_does_not() -> None:
    depths = World([CHEAP] * 3 + [(0.05, 0.05, 0.05)] * 3, lambda tokens: 1 + 0.15 * tokens).settled(600)
    assert min(depths[:3]) > 1.8
    assert max(depths[3:]) < 1


def test_costs_that_jump_at_a_size_keep_the_step_below_it() -> None:
    world = World([CHEAP] * 4, lambda tokens: 1.0 if tokens <= 10 else 10.0)
    history = [world.round() for _ in range(400)]
    sizes = Counter(4 + sum(depths) for depths in history[200:])
    assert sum(count for size, count in sizes.items() if 8 <= size <= 10) > 120


@pytest.mark.parametrize("decoder", [memory_bound, lambda t: 1 + 0.2 * t, lambda t: 1 - 0.9**t + 0.03 * t])
@pytest.mark.parametrize(("count", "whole"), [(1, False), (12, False), (1, True), (12, True)])
def test_trials_and_errors_cost_little(decoder: Callable[[int], float], count: int, whole: bool) -> None:
    rates = (0.85, 0.75, 0.65)
    world = World([rates] * count, decoder, module=0.02, whole=whole)
    for _ in range(600):
        world.round()
    each = np.cumprod([1.0, *rates]).cumsum()
    best = max(count * each[d] / (decoder(count * (1 + d)) + 0.02 * d) for d in range(4))
    assert world.tokens / world.seconds > 0.88 * best


def test_new_sequences_begin_with_what_the_others_taught() -> None:
    world = World([(0.0, 0.0, 0.0)] * 4, memory_bound)
    world.settled()
    assert world.batch.member().acceptance.rates[0] < 0.3


def test_the_limit_of_a_sequence_holds() -> None:
    member = BatchDepth(3, RoundCosts(3, memory_bound)).member()
    member.depth = 3
    assert [member.choose(limit) for limit in range(5)] == [0, 1, 2, 3, 3]


def test_without_modules_or_sequences_there_is_nothing_to_choose() -> None:
    empty = BatchDepth(0, RoundCosts(0, memory_bound))
    member = empty.member()
    empty.choose([member], 0)
    assert member.choose(3) == 0
    BatchDepth(3, RoundCosts(3, memory_bound)).choose([], 5)


def test_costs_are_read_between_and_beyond_what_was_measured() -> None:
    costs = StepCosts(lambda tokens: 2.0 * tokens)
    assert not costs.measured
    assert costs.seconds(3) == 6
    for _ in range(2):
        costs.record(4, 10.0)
        costs.record(8, 20.0)
    assert costs.measured
    assert costs.seconds(4) == 10
    assert costs.seconds(6) == 15
    assert costs.seconds(2) == 5  # the prior's ratio
    assert costs.seconds(16) == 40
    assert costs.seconds(0) == 0
    assert costs.known(4)
    assert not costs.known(6)
    assert costs.age(8) < costs.age(4) < costs.age(5)


def test_what_was_measured_of_a_round_has_its_modules_in_it() -> None:
    costs = RoundCosts(3, lambda tokens: 2.0 * tokens)
    assert costs.seconds(3, [1, 1, 0]) == 6 + 2 * PRIOR_MODULE * 2
    for _ in range(2):
        costs.record(4, 2, 10.0)
    assert costs.known(4, 2)
    assert not costs.known(4, 1)
    assert costs.age(4, 2) < costs.age(4, 1)
    assert costs.seconds(4, [2, 2, 0]) == costs.seconds(4, [1, 1, 0]) == 10
    assert costs.seconds(8, [2, 2, 0]) == 20
    # Of other numbers of modules nothing is known but this.
    assert costs.seconds(8, [2, 2, 2]) == 20 + PRIOR_MODULE * 2.5
    assert costs.seconds(8, [0, 0, 0]) == 20 - 2 * PRIOR_MODULE * 2.5
    for _ in range(2):
        costs.record(4, 1, 3.0)
    assert costs.seconds(4, [1, 0, 0]) == 3
    assert costs.seconds(4, [2, 2, 0]) == 10


def test_a_hiccup_does_not_decide() -> None:
    costs = StepCosts(lambda tokens: 1.0)
    for seconds in (500.0, 1.0, 1.0, 1.0, 300.0):
        costs.record(5, seconds)
    assert costs.seconds(5) < 1.2


def test_the_prior_is_the_bytes_of_weights_with_the_expected_union_of_experts() -> None:
    config = Step35Config.parse(raw_config())
    prior = prior_cost(config)
    dense, routed = _weights(config)
    cost = Cost(weight_bytes=dense, expert_bytes=routed // 12, experts=12, top_k=3)
    for tokens in (1, 2, 7, 64):
        expected = cost.bytes(tokens, 0) / cost.bytes(1, 0) + 0.02 * tokens
        assert prior(tokens) == pytest.approx(expected)
    # Experts already loaded make the next token cheaper.
    assert prior(2) - prior(1) > 3 * (prior(32) - prior(31))


def _weights(config: Step35Config) -> tuple[int, int]:
    from step35_trt.checkpoint import expected_tensors

    dense = routed = 0
    for name, shape in expected_tensors(config).items():
        layer = name.split(".")[2] if name.startswith("model.layers.") else ""
        if "embed_tokens" in name or (layer and int(layer) >= len(config.layers)):
            continue
        experts = ".moe." in name and len(shape) == 3
        routed += experts * int(np.prod(shape))
        dense += (not experts) * int(np.prod(shape))
    return dense, routed


def test_a_member_is_a_policy() -> None:
    from step35_trt.runtime.decoding.depth import DepthPolicy

    assert isinstance(Member(BatchDepth(3, RoundCosts(3, memory_bound))), DepthPolicy)
