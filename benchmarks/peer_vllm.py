"""vLLM's Triton kernels for mixtures of experts beside ours: what `benchmarks.kernels --peer` runs.

Their file is taken from the published wheel, never from here, and is all that has to be carried to a GPU:

    pip download --no-deps --dest build/peer vllm==0.33.0
    unzip -jo build/peer/vllm-*.whl vllm/model_executor/layers/fused_moe/fused_moe.py -d build/peer
    python -m benchmarks.kernels --peer build/peer/fused_moe.py

Only the functions under `triton.jit` are loaded, so nothing else of vLLM is needed. They are launched as vLLM
does: one product for gate and up over tokens sorted by expert, the activation, a second product that weighs,
a sum. What is done in the peer's favour: sorting and padding are not timed, the activation is one kernel, and
of several tilings the fastest counts.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from step35_trt.errors import CorruptInputError
from step35_trt.kernels import plugin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from step35_trt.kernels.workloads import ExpertsCall

KERNELS = ("write_zeros_to_output", "fused_moe_kernel_gptq_awq", "fused_moe_kernel")
GROUP = 128
FORMATS = ("bf16", "fp8_block", "int4")  # fp8 a channel has scales of whole tokens there: another computation
clipped_swiglu = plugin.load("sparse_moe", "products").clipped_swiglu


@dataclass(frozen=True)
class Tiling:
    """Rows (tokens), columns (features) and depth of a tile, and how it is compiled."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}, {self.warps} warps, {self.stages} stages"


FEW = (Tiling(16, 64, 128, 4, 4), Tiling(16, 32, 64, 4, 4), Tiling(16, 128, 64, 4, 3))
MANY = (Tiling(64, 128, 64, 4, 3), Tiling(128, 128, 64, 8, 3))
MANY_TOKENS = 256


def tilings(call: ExpertsCall) -> tuple[Tiling, ...]:
    """What is tried for a number of tokens."""
    return FEW if len(call.x) <= MANY_TOKENS else MANY


def load(path: Path) -> dict[str, Any]:
    """The kernels of the file, by name.

    Raises:
        CorruptInputError: it is not the file, or another release's.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError) as error:
        raise CorruptInputError(f"{path} cannot be read: {error}") from None
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in KERNELS]
    if {node.name for node in found} != set(KERNELS):
        raise CorruptInputError(
            f"{path} lacks kernels of vLLM's fused_moe.py", "See benchmarks/peer_vllm.py."
        )
    text = "\n\n\n".join(ast.unparse(node) for node in found)
    folder = Path(_folder().name)
    (folder / "peer_kernels.py").write_text(f"import triton\nimport triton.language as tl\n\n\n{text}\n")
    spec = importlib.util.spec_from_file_location("peer_kernels", folder / "peer_kernels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: getattr(module, name) for name in KERNELS}


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Triton reads a kernel's source from its file, for as long as the process lives."""
    return tempfile.TemporaryDirectory(prefix="peer-")


@triton.jit  # type: ignore[untyped-decorator]
def activate(both, out, limit, INNER: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """`out [pairs, INNER]` from gate and up side by side; the grid is `[pairs, blocks]`."""
    pair = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < INNER
    gate = tl.load(both + pair * 2 * INNER + column, inside, other=0.0).to(tl.float32)
    up = tl.load(both + pair * 2 * INNER + INNER + column, inside, other=0.0).to(tl.float32)
    tl.store(out + pair * INNER + column, clipped_swiglu(gate, up, limit).to(tl.bfloat16), inside)


@triton.jit  # type: ignore[untyped-decorator]
def quantise(x, codes, scales, K: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each row in groups of `GROUP`: e4m3 codes and fp32 scales `[rows, K / GROUP]`; the grid is theirs."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = row * K + group * GROUP + tl.arange(0, GROUP)
    numbers = tl.load(x + at).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(numbers), 0) / 448.0, 1e-10)
    tl.store(codes + at, (numbers / scale).to(tl.float8e4nv))
    tl.store(scales + row * (K // GROUP) + group, scale)


@dataclass(frozen=True)
class Stack:
    """Weights `[E, N, K]` (int4: two codes a byte along K) with scales, as the peer's kernels take them."""

    values: Tensor
    scales: Tensor | None


@functools.lru_cache(maxsize=1)
def stacks(weights: Any, kind: str) -> tuple[Stack, Stack]:
    """Our weights in the peer's layout: gate above up, and down."""
    gate, up, down = (_stack(matrix, kind) for matrix in (weights.gate, weights.up, weights.down))
    scales = None if gate.scales is None or up.scales is None else torch.cat([gate.scales, up.scales], 1)
    return Stack(torch.cat([gate.values, up.values], 1), scales), down


def _stack(matrix: Any, kind: str) -> Stack:
    if kind != "int4":
        return Stack(matrix.values, matrix.scales)
    unpack = plugin.load("sparse_moe", "weights").unpack_int4
    found = [unpack(words, pairs) for words, pairs in zip(matrix.values, matrix.scales, strict=True)]
    values = [codes[:, 0::2] | codes[:, 1::2] << 4 for codes, _ in found]
    return Stack(torch.stack(values), torch.stack([scales for _, scales in found]))


@dataclass(frozen=True)
class Blocks:
    """Pairs sorted by expert and padded to whole tiles, as `moe_align_block_size` of vLLM leaves them."""

    pairs: Tensor
    experts: Tensor
    padded: Tensor

    @classmethod
    def of(cls, ids: Tensor, experts: int, rows: int) -> Blocks:
        """Tiles of `rows` pairs; places beyond an expert's last name a pair that does not exist."""
        flat = ids.flatten().long()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=experts)
        needed = -(-counts // rows)
        starts = (needed.cumsum(0) - needed) * rows
        firsts = counts.cumsum(0) - counts
        place = torch.arange(len(flat), device=ids.device) - firsts[flat[order]] + starts[flat[order]]
        pairs = torch.full((int(needed.sum()) * rows,), len(flat), dtype=torch.int32, device=ids.device)
        pairs[place] = order.int()
        owners = torch.repeat_interleave(torch.arange(experts, device=ids.device), needed).int()
        return cls(pairs, owners, torch.tensor([len(pairs)], dtype=torch.int32, device=ids.device))


def step(kernels: dict[str, Any], call: ExpertsCall, tiling: Tiling) -> Callable[[], Tensor]:
    """`[t, D]` bf16 by the peer's kernels; the call waits for nothing."""
    geometry, device = call.geometry, call.x.device
    pairs, inner, hidden = call.ids.numel(), geometry.inner, geometry.hidden
    both, down = stacks(call.weights, geometry.format)
    blocks = Blocks.of(call.ids, geometry.experts, tiling.m)
    first = torch.empty(pairs, 2 * inner, dtype=torch.bfloat16, device=device)
    middle = torch.empty(pairs, inner, dtype=torch.bfloat16, device=device)
    last = torch.empty(pairs, hidden, dtype=torch.bfloat16, device=device)
    limit = call.limit or float("inf")
    product = functools.partial(_product, kernels, geometry.format, call.mix, blocks, tiling)

    def run() -> Tensor:
        product(call.x, both, first, geometry.top_k, False)
        activate[pairs, triton.cdiv(inner, 1024)](first, middle, limit, INNER=inner, BLOCK=1024)
        product(middle, down, last, 1, True)
        return last.view(len(call.x), -1, hidden).sum(1)

    return run


def _product(
    kernels: dict[str, Any],
    kind: str,
    mix: Tensor,
    blocks: Blocks,
    tiling: Tiling,
    a: Tensor,
    b: Stack,
    c: Tensor,
    top_k: int,
    weigh: bool,
) -> None:
    """One grouped product: `c [pairs, N]` from `a [rows, K]`, where pair p takes row `p // top_k`."""
    k, n = a.shape[1], c.shape[1]
    scales = None
    if kind == "fp8_block":
        codes = torch.empty(a.shape, dtype=torch.float8_e4m3fn, device=a.device)
        scales = torch.empty(len(a), k // GROUP, device=a.device)
        quantise[len(a), k // GROUP](a, codes, scales, K=k, GROUP=GROUP)
        a = codes
    depth = min(tiling.k, GROUP) if kind != "bf16" else tiling.k
    arguments = {
        "a_ptr": a,
        "b_ptr": b.values,
        "c_ptr": c,
        "b_scale_ptr": b.scales,
        "topk_weights_ptr": mix,
        "sorted_token_ids_ptr": blocks.pairs,
        "expert_ids_ptr": blocks.experts,
        "num_tokens_post_padded_ptr": blocks.padded,
        "N": n,
        "K": k,
        "EM": len(blocks.pairs),
        "num_valid_tokens": len(c),
        **dict(_strides("a", a, "mk")),
        **dict(_strides("b", b.values, "enk")),
        **dict(_strides("c", c, "mn")),
        **dict(_strides("bs", b.scales, "enk")),
        "BLOCK_SIZE_M": tiling.m,
        "BLOCK_SIZE_N": tiling.n,
        "BLOCK_SIZE_K": depth,
        "GROUP_SIZE_M": 1,
        "SPLIT_K": 1,
        "MUL_ROUTED_WEIGHT": weigh,
        "top_k": top_k,
        "compute_type": tl.bfloat16,
        "use_int8_w8a16": False,
        "num_warps": tiling.warps,
        "num_stages": tiling.stages,
    }
    if kind == "int4":
        name = "fused_moe_kernel_gptq_awq"
        arguments |= {"b_zp_ptr": None, "stride_bze": 0, "stride_bzn": 0, "stride_bzk": 0, "has_zp": False}
        arguments |= {"block_k_diviable": k % depth == 0, "group_size": GROUP, "use_int4_w4a16": True}
    else:
        name = "fused_moe_kernel"
        block = GROUP if kind == "fp8_block" else 0
        arguments |= {"b_bias_ptr": None, "stride_bbe": 0, "stride_bbn": 0, "HAS_BIAS": False}
        arguments |= {"a_scale_ptr": scales, **dict(_strides("as", scales, "mk"))}
        arguments |= {"group_n": block, "group_k": block, "use_fp8_w8a8": bool(block)}
        arguments |= {"use_int8_w8a8": False, "per_channel_quant": False}
        arguments |= {"naive_block_assignment": False, "USE_TD": False}
        arguments |= {"SWAP_AB": bool(block) and tiling.m < 64 <= tiling.n}  # as vLLM does on Hopper
    grid = (triton.cdiv(len(blocks.pairs), tiling.m) * triton.cdiv(n, tiling.n),)
    kernels[name][grid](**arguments)


def _strides(name: str, tensor: Tensor | None, axes: str) -> Iterator[tuple[str, int]]:
    for axis, letter in enumerate(axes):
        yield f"stride_{name}{letter}", 0 if tensor is None else tensor.stride(axis)
