"""What files are compared by: samples that reach everywhere, and sums that no flipped bit passes."""

from __future__ import annotations

import zlib
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from step35_trt import digests
from step35_trt.digests import BLOCK, BLOCKS, FileRecord

if TYPE_CHECKING:
    from pathlib import Path

PIECE = 50_000


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two files of weights in several pieces, the second one's last piece being short, and a small file."""
    monkeypatch.setattr(digests, "PIECE", PIECE)
    monkeypatch.setattr(digests, "BUFFER", 4099)
    rng = np.random.default_rng(0)
    for name, size in {"a": 4 * PIECE, "b": 3 * PIECE + 1234, "small": 777}.items():
        (tmp_path / name).write_bytes(rng.bytes(size))
    return tmp_path


def records(folder: Path) -> dict[str, FileRecord]:
    """The small one last, as a manifest may have it."""
    kinds = {"a": FileRecord.weights, "b": FileRecord.weights, "small": FileRecord.small}
    return {name: kind(folder / name) for name, kind in kinds.items()}


@given(st.integers(0, 1 << 40))
def test_samples_reach_everywhere(size: int) -> None:
    offsets = digests.sampled_offsets(size)
    assert offsets[0] == 0
    assert offsets[-1] == max(0, size - BLOCK)
    assert len(offsets) <= BLOCKS
    assert all(b - a <= size / (BLOCKS - 1) + 2 * BLOCK for a, b in pairwise(offsets))
    if size >= BLOCKS * BLOCK:
        assert len(offsets) == BLOCKS


def test_a_piece_has_its_crc(files: Path) -> None:
    content = (files / "b").read_bytes()
    pieces = [content[start : start + PIECE] for start in range(0, len(content), PIECE)]
    assert FileRecord.weights(files / "b").crc32 == tuple(map(zlib.crc32, pieces))


@pytest.mark.parametrize("name", ["a", "b", "small"])
@pytest.mark.parametrize("at", [0, PIECE - 1, PIECE, 2 * PIECE + 4099, -1])
def test_a_flipped_bit_is_found(files: Path, name: str, at: int) -> None:
    before, path = records(files), files / name
    content = bytearray(path.read_bytes())
    if at >= len(content):
        pytest.skip("the file is shorter")
    for bit in range(8):
        content[at] ^= 1 << bit
        path.write_bytes(content)
        assert digests.damaged(files, before) == [name]
        content[at] ^= 1 << bit
    path.write_bytes(content)
    assert digests.damaged(files, before) == []


def test_progress_counts_every_byte(files: Path) -> None:
    told: list[tuple[int, int, str]] = []
    digests.damaged(files, records(files), lambda *what: told.append(what))
    whole = sum(path.stat().st_size for path in files.iterdir())
    assert [done for done, _, _ in told] == sorted({done for done, _, _ in told})
    assert told[-1][:2] == (whole, whole)
    assert {name for _, _, name in told} == {"a", "b", "small"}


def test_a_load_looks_at_the_sample_alone(files: Path) -> None:
    path, record = files / "b", FileRecord.weights(files / "b")
    content, sampled = path.read_bytes(), digests.sampled_offsets(record.size)
    inside = {offset + k for offset in sampled for k in (0, BLOCK - 1)}
    outside = {offset + BLOCK for offset in sampled[:-1]} - {o + k for o in sampled for k in range(BLOCK)}
    assert outside
    for at, expected in [*((at, False) for at in inside), *((at, True) for at in outside)]:
        changed = bytearray(content)
        changed[at] ^= 1
        path.write_bytes(changed)
        assert record.resembles(path) is expected


def test_a_file_that_shrank_or_is_empty(files: Path) -> None:
    before = records(files)
    with (files / "a").open("r+b") as stream:
        stream.truncate(PIECE)
    assert digests.damaged(files, before) == ["a"]
    (files / "none").write_bytes(b"")
    nothing = FileRecord.weights(files / "none")
    assert digests.damaged(files, {"none": nothing}) == []
    assert nothing.resembles(files / "none")
