"""Verifying holds some weights at a time, however large the model is, and finds the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from step35_trt.interpret import weights
from step35_trt.interpret.kept import Kept
from step35_trt.interpret.ranks import RankedSession
from step35_trt.interpret.verify import compare_steps
from tests.forms import interpreted
from tests.process_memory import printed
from tests.synthetic import raw_config, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from step35_trt.interpret.verify import Comparison


@given(st.lists(st.integers(0, 9)), st.integers(0, 20))
def test_the_least_recently_used_goes_first(keys: list[int], budget: int) -> None:
    """Against a list in the order of use; the value of k has k bytes."""
    kept, made, used = Kept[int](budget, lambda value: value), list[int](), list[int]()

    def make(key: int) -> int:
        made.append(key)
        return key

    for key in keys:
        before = len(made)
        assert kept.get(key, lambda key=key: make(key)) == key  # type: ignore[misc]
        assert (len(made) > before) == (key not in used)
        used = [other for other in used if other != key] + [key] * (key <= budget)
        while sum(used) > budget:
            used.pop(0)
        assert kept.held == sum(used)


def compared(checkpoint: Path, *lengths: int) -> tuple[Comparison, Kept, Kept]:  # type: ignore[type-arg]
    session = interpreted(checkpoint, "bf16")
    rng = np.random.default_rng(0)
    calls = [rng.integers(0, session.config.vocab_size, length) for length in lengths]
    own = session.executor.weights
    return compare_steps(RankedSession.alone(session), own, calls), own._packed, own._decoded


def test_what_is_forgotten_is_read_again(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, packed, decoded = compared(checkpoint, 9, 1, 4)
    assert min(packed.held, decoded.held) > 200_000
    monkeypatch.setattr(weights, "KEPT_BYTES", 50_000)
    some, packed, decoded = compared(checkpoint, 9, 1, 4)
    assert max(packed.held, decoded.held) <= 50_000
    assert [(f.name, f.error, f.worst_row, f.flips) for f in some.findings] == [
        (f.name, f.error, f.worst_row, f.flips) for f in whole.findings
    ]


PEAK = """
import sys
from pathlib import Path
from step35_trt.interpret import weights
from tests.cpu.interpret.test_memory import compared
from tests.process_memory import status

weights.KEPT_BYTES = 8 << 20
compared(Path(sys.argv[1]), 1)
base = status("VmHWM")
for source in sys.argv[2:]:
    compared(Path(source), 6)
    print(status("VmHWM") - base)
"""


def test_memory_does_not_grow_with_layers(tmp_path: Path) -> None:
    """Four layers more are 52 MB more of weights, and no more memory."""
    small = write_checkpoint(tmp_path / "small", raw_config())
    sources = []
    for layers in (5, 9):
        raw = raw_config(layers=layers, hidden_size=512, moe_num_experts=8, moe_intermediate_size=512)
        sources.append(write_checkpoint(tmp_path / f"c{layers}", raw))
    peaks = printed(PEAK, small, *sources)
    sizes = [sum(path.stat().st_size for path in source.glob("*.safetensors")) for source in sources]
    assert sizes[1] > sizes[0] + 50e6
    assert peaks[1] < peaks[0] + 25e6
