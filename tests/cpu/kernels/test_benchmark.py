"""The benchmark's own parts: its time, and what it launches of a peer."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks import peer_vllm
from benchmarks.kernels import Budget
from step35_trt.errors import CorruptInputError
from step35_trt.kernels.plugin import load

if TYPE_CHECKING:
    from pathlib import Path


def test_a_workload_begins_only_where_it_would_end_in_time() -> None:
    budget = Budget(1.0, started=time.monotonic() - 50)
    assert budget.admits_another()
    budget.took(5)
    assert budget.admits_another()
    budget.took(20)
    budget.took(1)
    assert not budget.admits_another()


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_blocks_hold_each_pair_once_beside_its_expert(rows: int) -> None:
    ids = torch.randint(0, 5, (7, 2), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    ids[ids == 3] = 4  # an expert that nobody chose
    found = peer_vllm.Blocks.of(ids, 5, rows)
    flat = ids.flatten()
    assert int(found.padded) == len(found.pairs) == rows * len(found.experts)
    tiles = found.pairs.view(-1, rows)
    real = tiles < len(flat)
    assert sorted(tiles[real].tolist()) == list(range(len(flat)))
    owners = found.experts[:, None].expand_as(tiles)
    assert torch.equal(owners[real], flat[tiles[real].long()])
    assert set(tiles[~real].tolist()) <= {len(flat)}


def test_the_peers_small_kernels() -> None:
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(3, 2 * 40, generator=generator).bfloat16()
    out = torch.empty(3, 40, dtype=torch.bfloat16)
    peer_vllm.activate[3, 2](both, out, 0.7, INNER=40, BLOCK=32)
    naive = load("sparse_moe", "naive")
    want = naive.clipped_swiglu(both[:, :40].float(), both[:, 40:].float(), 0.7)
    torch.testing.assert_close(out.float(), want, atol=1e-3, rtol=1e-2)
    x = torch.randn(3, 256, generator=generator).bfloat16()
    codes, scales = torch.empty(3, 256, dtype=torch.float8_e4m3fn), torch.empty(3, 2)
    peer_vllm.quantise[3, 2](x, codes, scales, K=256, GROUP=128)
    back = (codes.float().view(3, 2, 128) * scales[..., None]).view(3, 256)
    torch.testing.assert_close(back, x.float(), atol=0.01, rtol=0.07)


def test_int4_is_what_the_peer_unpacks() -> None:
    weights, pack = load("sparse_moe", "weights"), load("sparse_moe", "pack")
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (2, 6, 256), generator=generator, dtype=torch.uint8).numpy()
    scales = torch.rand(2, 6, 2, generator=generator).half().numpy()
    words, pairs = (torch.from_numpy(a) for a in pack.pack_int4(codes, scales))
    found = peer_vllm._stack(weights.Matrix(words, pairs), "int4")
    assert found.scales is not None
    low, high = found.values & 15, found.values >> 4
    assert torch.equal(torch.stack([low, high], -1).view(2, 6, 256), torch.from_numpy(codes))
    assert torch.equal(found.scales, torch.from_numpy(scales))


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("import triton\n\ndef fused_moe_kernel():\n    pass\n")
    with pytest.raises(CorruptInputError, match="lacks kernels"):
        peer_vllm.load(tmp_path / "x.py")
    with pytest.raises(CorruptInputError, match="cannot be read"):
        peer_vllm.load(tmp_path / "y.py")
