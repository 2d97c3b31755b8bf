"""What decides a kernel's identity, and what does not."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from step35_trt.kernels import content
from step35_trt.kernels.content import digest
from step35_trt.kernels.targets import TARGETS
from tests.cpu.kernels import toys

if TYPE_CHECKING:
    from pathlib import Path

HOPPER = TARGETS["sm_90"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    content.sources.cache_clear()
    return toys.write(tmp_path)


def test_names_and_other_files_do_not_count(root: Path) -> None:
    before = digest(toys.SCALE, HOPPER, root)
    (root / "toy" / "other.py").write_text("x = 1\n")
    assert digest(replace(toys.SCALE, name="x"), HOPPER, root) == before


@pytest.mark.parametrize("file", ["kernels", "steps"])
def test_all_code_that_is_called_counts(root: Path, file: str) -> None:
    before = digest(toys.SCALE, HOPPER, root)
    path = root / "toy" / f"{file}.py"
    path.write_text(path.read_text().replace("2.0", "3.0") + "\n")
    assert digest(toys.SCALE, HOPPER, root) != before


def test_each_option_counts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = [
        toys.SCALE,
        replace(toys.SCALE, function="product"),
        replace(toys.SCALE, aligned=("x",)),
        replace(toys.SCALE, num_warps=8),
        replace(toys.SCALE, num_stages=2),
        replace(toys.SCALE, constants={"BLOCK": 1024, "DOUBLE": 1}),
        replace(toys.SCALE, signature=dict(toys.SCALE.signature) | {"n": "i64"}),
    ]
    seen = {digest(variant, HOPPER, root) for variant in some}
    seen.add(digest(toys.SCALE, TARGETS["sm_100"], root))
    monkeypatch.setattr(content, "version", lambda _: "0.0")
    seen.add(digest(toys.SCALE, HOPPER, root))
    assert len(seen) == len(some) + 2
