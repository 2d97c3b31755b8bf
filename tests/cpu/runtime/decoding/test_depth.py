from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from step35_trt.runtime.decoding.depth import DepthController, FixedDepth, depth_policy

MEMORY_BOUND = (1.0, 1.39, 1.76, 2.14)


class World:
    """Heads that are right at given rates and rounds that take given seconds."""

    def __init__(self, acceptance: tuple[float, ...], costs: tuple[float, ...], seed: int = 0) -> None:
        self.acceptance, self.costs = acceptance, costs
        self.rng = np.random.default_rng(seed)
        self.warm: set[int] = set()
        self.tokens = self.seconds = 0.0

    def round(self, controller: DepthController, *, hiccup: float = 0.0, warm_up: float = 0.0) -> int:
        depth = controller.choose(len(self.acceptance))
        accepted = 0
        while accepted < depth and self.rng.random() < self.acceptance[accepted]:
            accepted += 1
        seconds = self.costs[depth] * self.rng.uniform(0.9, 1.1)
        if depth not in self.warm:
            seconds += warm_up
        if hiccup and self.rng.random() < hiccup:
            seconds *= 30
        self.warm.add(depth)
        controller.record(depth, accepted, seconds)
        self.tokens += accepted + 1
        self.seconds += self.costs[depth]
        return depth

    def best_rate(self) -> float:
        tokens = np.cumprod([1.0, *self.acceptance]).cumsum()
        return float((tokens / self.costs).max())


@pytest.mark.parametrize(
    ("acceptance", "costs", "best"),
    [
        ((0.0, 0.0, 0.0), MEMORY_BOUND, 0),
        ((0.0, 0.0, 0.0), (1.0, 1.15, 1.3, 1.45), 0),
        ((0.9, 0.2, 0.2), MEMORY_BOUND, 1),
        ((0.9, 0.9, 0.2), MEMORY_BOUND, 2),
        ((1.0, 1.0, 1.0), (1.0, 1.05, 1.1, 1.15), 3),
        ((1.0, 1.0, 1.0), (1.0, 3.0, 4.5, 6.0), 0),
        ((0.9, 0.9, 0.9), (1.0, 3.0, 2.0, 1.9), 3),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 0.002])
def test_the_depth_with_the_most_tokens_per_second_is_found_and_kept(
    acceptance: tuple[float, ...], costs: tuple[float, ...], best: int, scale: float
) -> None:
    controller, world = DepthController(3), World(acceptance, tuple(scale * c for c in costs))
    depths = [world.round(controller, warm_up=100 * scale) for _ in range(400)]
    assert Counter(depths[100:])[best] > 250
    # Never for good, however: each depth is looked at again.
    assert set(depths[100:]) == {0, 1, 2, 3}


@pytest.mark.parametrize("costs", [MEMORY_BOUND, (1.0, 1.05, 1.1, 1.15)])
@pytest.mark.parametrize(
    "acceptance",
    [
        (0.75, 0.60, 0.50),
        (0.85, 0.75, 0.65),
        (0.90, 0.85, 0.80),
        (0.72, 0.58, 0.43),
        (0.3, 0.3, 0.3),
        (0, 0, 0),
    ],
)
def test_close_calls_cost_little(acceptance: tuple[float, ...], costs: tuple[float, ...]) -> None:
    controller, world = DepthController(3), World(acceptance, costs)
    for _ in range(2000):
        world.round(controller, hiccup=0.02, warm_up=50.0)
    assert world.tokens / world.seconds > 0.94 * world.best_rate()


def test_it_notices_that_the_text_has_changed() -> None:
    controller, world = DepthController(3), World((0.0, 0.0, 0.0), MEMORY_BOUND)
    for _ in range(300):
        world.round(controller)
    assert controller.best(3) == 0
    world.acceptance = (0.95, 0.95, 0.95)
    depths = [world.round(controller) for _ in range(400)]
    assert Counter(depths[-100:])[3] > 80
    world.acceptance = (0.0, 0.0, 0.0)
    depths = [world.round(controller) for _ in range(200)]
    assert Counter(depths[-100:])[0] > 80


def test_it_notices_that_rounds_have_become_dearer() -> None:
    controller, world = DepthController(3), World((0.9, 0.8, 0.8), (1.0, 1.05, 1.1, 1.15))
    for _ in range(200):
        world.round(controller)
    assert controller.best(3) == 3
    world.costs = (1.0, 3.0, 5.0, 7.0)
    assert Counter([world.round(controller) for _ in range(300)][-100:])[0] > 80


def test_a_warm_up_or_a_hiccup_does_not_decide() -> None:
    controller = DepthController(3)
    for seconds in (500.0, 1.0, 7.0, 1.0):
        controller.record(0, 0, seconds)
    assert controller.costs[0] == pytest.approx(1.0)
    controller.record(0, 0, 500.0)
    assert controller.costs[0] < 1.2
    for _ in range(40):
        controller.record(0, 0, 3.0)
    assert controller.costs[0] == pytest.approx(3.0, rel=0.05)


def test_acceptance_is_conditional_and_fades_to_hope() -> None:
    controller = DepthController(3)
    hopeful = controller.acceptance
    for accepted in (0, 1) * 200:
        controller.record(3, accepted, 1.0)
    first, second, third = controller.acceptance
    assert first == pytest.approx(0.5, abs=0.03)
    assert second == pytest.approx(0.0, abs=0.05)  # tested in half of the rounds, never right
    assert third == hopeful[2]  # never tested: the second was never right
    for _ in range(1000):
        controller.record(0, 0, 1.0)
    assert controller.acceptance == pytest.approx(hopeful)


def test_depths_without_a_measurement_are_assumed_relative_to_those_with_one() -> None:
    controller = DepthController(3)
    assert controller.costs[0] == 1.0
    controller.record(1, 1, 0.0138)
    assert controller.costs == pytest.approx((0.01, 0.0138, 0.0176, 0.0214))


def test_the_limit_holds() -> None:
    controller, world = DepthController(3), World((1.0, 1.0, 1.0), (1.0, 1.0, 1.0, 1.0))
    for step in range(400):
        limit = step % 4
        depth = controller.choose(limit)
        assert 0 <= depth <= limit
        controller.record(depth, depth, world.costs[depth])


def test_without_the_clock_the_choices_follow_from_acceptance_alone() -> None:
    slow, fast = DepthController(3, timed=False), DepthController(3, timed=False)
    rng = np.random.default_rng(2)
    depths = []
    for _ in range(300):
        depth = slow.choose(3)
        assert fast.choose(3) == depth
        accepted = min(depth, int(rng.integers(0, 4)))
        slow.record(depth, accepted, 100 * rng.random())
        fast.record(depth, accepted, 0.001)
        depths.append(depth)
    assert len(set(depths)) > 1


def test_a_clock_that_stands_still_does_no_harm() -> None:
    controller = DepthController(2)
    for _ in range(100):
        depth = controller.choose(2)
        controller.record(depth, depth, 0.0)


def test_policies() -> None:
    assert FixedDepth(3).choose(1) == 1
    assert FixedDepth(2).choose(3) == 2
    given = DepthController(3)
    assert depth_policy(given, 3, repeatable=False) is given
    assert depth_policy(given, 3, repeatable=True) is not given
    assert isinstance(depth_policy(2, 2, repeatable=False), FixedDepth)
