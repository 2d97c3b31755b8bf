"""What the benchmarks on nano share: a fresh bundle and prompts from held-out text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from step35_trt.build import build
from step35_trt.engine import EngineSpec
from step35_trt.nano.corpus import held_out_text
from step35_trt.resources import NANO
from step35_trt.runtime.dialogue.text import Text
from step35_trt.runtime.load import open_bundle

if TYPE_CHECKING:
    from pathlib import Path

    from step35_trt.runtime.session import Session


def session(engine: str, directory: Path) -> Session:
    """Nano, built for `engine` under `directory`."""
    out = directory / engine
    build(NANO, out, EngineSpec.load(engine))
    return open_bundle(out)


def prompts(count: int, length: int) -> list[list[int]]:
    """`count` prompts of `length` tokens, spread evenly over the held-out text."""
    ids = Text.load(NANO).encode(held_out_text())
    starts = np.linspace(0, len(ids) - length - 1, count).astype(int)
    return [ids[start : start + length] for start in starts]
