"""What a round runs, and how it is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step35_trt.runtime.decoding.drafting import take_back
from step35_trt.runtime.programs.orders import StepOrder
from step35_trt.runtime.programs.round_order import ROUND, RoundOrder
from step35_trt.runtime.programs.round_plan import Part, parts
from step35_trt.runtime.session import RoundCall


@dataclass
class Lengths:
    """As much of a sequence as a plan looks at."""

    length: int
    modules: list[int] = field(default_factory=list)

    def draft_length(self, module: int) -> int:
        return self.modules[module]

    def truncate_draft(self, module: int, length: int) -> None:
        self.modules[module] = length


def call(sequence: Any, depth: int, modules: int) -> RoundCall:
    """Token t is number 100 + t."""
    return RoundCall(sequence, range(100, 101 + sequence.length), depth, modules)


def said(part: Part) -> tuple[int, int, list[int], list[int]]:
    return part.graph, part.past, list(part.token_ids), list(part.rows)


def test_the_steady_state() -> None:
    sequence = Lengths(10, [9, 8, 7])  # one draft of three stood
    assert [said(part) for part in parts(call(sequence, 3, 3), 4)] == [
        (1, 9, [110], [0]),
        (2, 8, [110, -1], [1]),
        (3, 7, [110, -1, -2], [2]),
        (0, 10, [110, -1, -2, -3], [0, 1, 2, 3]),
    ]


def test_modules_that_are_behind_catch_up() -> None:
    sequence = Lengths(20, [12, 13, 16])
    assert [said(part) for part in parts(call(sequence, 1, 3), 4)] == [
        (1, 12, [113, 114, 115, 116], []),
        (2, 13, [115, 116, 117], []),  # as far as its input goes
        (1, 16, [117, 118, 119, 120], [3]),
        (0, 20, [120, -1], [0, 1]),
    ]


def test_without_drafts_the_decoder_is_alone() -> None:
    assert [said(part) for part in parts(call(Lengths(3, []), 0, 0), 4)] == [(0, 3, [103], [0])]


def test_too_far_behind_or_too_deep_is_refused() -> None:
    with pytest.raises(AssertionError, match="too far behind"):
        parts(call(Lengths(20, [11]), 1, 1), 4)
    with pytest.raises(AssertionError):
        parts(call(Lengths(20, [19] * 4), 4, 4), 4)


@settings(max_examples=200, deadline=None)
@given(
    modules=st.integers(0, 3),
    prompt=st.integers(1, 30),
    backlog=st.lists(st.integers(0, 8), min_size=3, max_size=3),
    history=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=40),
)
def test_no_module_ever_falls_too_far_behind(
    modules: int, prompt: int, backlog: list[int], history: list[tuple[int, int]]
) -> None:
    """And no step of a sequence takes more than a decoding step may."""
    rows, given = [], prompt
    for module in range(modules):
        given = max(min(given, prompt - max(module, 1)) - backlog[module], prompt - 8, 0)
        rows.append(given)
    sequence = Lengths(prompt, rows)
    for wanted, right in history:
        depth, n = min(wanted, modules), sequence.length
        accepted = min(right, depth)
        for part in parts(call(sequence, depth, modules), 4):
            assert 1 <= len(part.token_ids) <= 4
            # Drafts come from the modules before, and none has run yet where no logits are wanted.
            drafted = depth if part.graph == 0 else part.graph - 1
            assert min(part.token_ids) >= (-drafted if len(part.rows) else 0)
            if part.graph:
                assert part.past == sequence.modules[part.graph - 1]
                sequence.modules[part.graph - 1] += len(part.token_ids)
        assert sequence.modules[:depth] == [n] * depth
        take_back(sequence, n, depth, accepted)  # type: ignore[arg-type]
        sequence.length = n + accepted + 1
        assert all(sequence.length - length <= 8 for length in sequence.modules)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(4, 30), st.integers(0, 3)), min_size=1, max_size=5),
    closed=st.lists(st.integers(0, 9), max_size=3),
    moves=st.integers(0, 3),
    beyond=st.integers(0, 4),
)
def test_an_order_is_what_it_was_encoded_from(
    lengths: list[tuple[int, int]], closed: list[int], moves: int, beyond: int
) -> None:
    found = []
    for slot, (length, depth) in enumerate(lengths):
        sequence = Lengths(length, [max(length - 6, 0), max(length - 7, 0), length - 3])
        found += [(slot, part) for part in parts(call(sequence, depth, 3), 4)]
    made = RoundOrder.of(found)
    order = RoundOrder(made.steps, tuple(closed), np.arange(2 * moves).reshape(-1, 2))
    vector = order.encoded()
    assert vector[0] == ROUND
    assert StepOrder.decode(made.steps[0].encoded()).graph >= 0 > ROUND
    again = RoundOrder.decode(np.concatenate([vector, np.full(beyond, 77)]))
    assert (again.closed, again.moves.tolist()) == (order.closed, order.moves.tolist())
    assert [vars_of(step) for step in again.steps] == [vars_of(step) for step in order.steps]
    # Modules without logits, then those that draft, then the decoder; each once.
    places = [(step.graph == 0, len(step.rows) > 0, step.graph) for step in made.steps]
    assert places == sorted(set(places))
    assert sum(len(step.slots) for step in made.steps) == len(found)


def vars_of(step: StepOrder) -> dict[str, Any]:
    return {key: np.asarray(value).tolist() for key, value in vars(step).items()}
