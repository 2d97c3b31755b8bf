"""What the CPU operators compute, in numpy and fp64, and how to run one operator."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from step35_trt.quantize.blocks import quantize_blocks
from step35_trt.quantize.cpu_layout import interleave_gate_up, tile


def available_isas() -> list[str]:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    isas = ["portable"]
    if {"avx2", "fma", "f16c"} <= flags:
        isas.append("avx2")
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"} <= flags:
        isas.append("avx512")
    if "asimddp" in flags:
        isas.append("neon")
    return isas


def session(library: Path, isa: str, op: str, inputs: dict, fixed: dict, threads=2, outputs=1, **attributes):
    """One operator: `inputs` names what is fed, `fixed` the initializers; order as given."""
    names = [*inputs, *fixed]
    made = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op, names, made, domain="step35", **attributes)
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None, None]) for n in inputs]
    outs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None, None]) for n in made]
    held = [onnx.numpy_helper.from_array(v, n) for n, v in fixed.items()]
    return loaded(library, isa, helper.make_graph([node], "g", values, outs, held), threads)


def loaded(library: Path, isa: str, graph: onnx.GraphProto, threads=2):
    """A graph with our operators on one instruction set."""
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("step35", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    before = os.environ.get("STEP35_CPU_ISA")
    os.environ["STEP35_CPU_ISA"] = isa
    try:
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    finally:
        if before is None:
            del os.environ["STEP35_CPU_ISA"]
        else:
            os.environ["STEP35_CPU_ISA"] = before


@dataclass
class Weight:
    """A weight `[..., N, K]` as quantised: fp64 values for the definition, tiles for the operator."""

    values: np.ndarray
    tiles: np.ndarray
    scales: np.ndarray

    @classmethod
    def of(cls, weight: np.ndarray, block: int) -> Weight:
        codes, scales = quantize_blocks(weight.astype(np.float32), 4, block)
        centred = np.stack([codes & 15, codes >> 4], -1).reshape(weight.shape).astype(np.float64) - 8
        with np.errstate(over="ignore"):
            halves = scales.astype(np.float16).astype(np.float64)
        return cls(centred * np.repeat(halves, block, -1), *tile(codes, scales))


def int8_blocks(x: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Activations after quantisation, fp64, and how far off each is if fp32 rounded its input otherwise."""
    t, k = x.shape
    blocks = x.reshape(t, k // block, block)
    most = np.abs(blocks).max(-1, keepdims=True)
    most = np.where(most < 1e-30, 0, most)
    steps = blocks / np.where(most == 0, 1, most) * (most > 0) * 127
    exact = np.rint(steps) * most / 127
    unsure = np.abs(np.abs(steps - np.floor(steps)) - 0.5) < 1e-3
    return exact.reshape(t, k), (unsure * most / 127).reshape(t, k)


def linear(x: np.ndarray, w: np.ndarray, block: int, wobble: np.ndarray | float = 0.0):
    """`x Wᵀ` of quantised x, and the bound on what fp32 may make of it."""
    q, unsure = int8_blocks(x.astype(np.float64), block)
    bound = 1e-6 * np.abs(q) @ np.abs(w).T + (unsure + np.asarray(wobble)) @ np.abs(w).T
    return q @ w.T, bound


def experts(x, selection, weights, gate, up, down, *, top_k, scale, limit, block):
    """Specification 2.7 to 2.9 with quantised inputs of every product."""
    y, bound = np.zeros(x.shape), np.zeros(x.shape)
    limit = limit or np.inf
    for t in range(len(x)):
        chosen = np.sort(np.argsort(-selection[t], kind="stable")[:top_k])
        mix = weights[t, chosen].astype(np.float64)
        mix = mix / (mix.sum() + 1e-20) * scale
        for e, weight in zip(chosen, mix, strict=True):
            g, g_off = linear(x[t : t + 1], gate[e], block)
            u, u_off = linear(x[t : t + 1], up[e], block)
            a, c = np.minimum(g / (1 + np.exp(-g)), limit), np.clip(u, -limit, limit)
            h = a * c
            off = 1.1 * g_off * np.abs(c) + u_off * np.abs(a) + 1e-6 * np.abs(h)
            d, d_off = linear(h, down[e], block, wobble=off)
            y[t] += weight * d[0]
            bound[t] += weight * d_off[0] + 1e-6 * abs(weight) * np.abs(d[0])
    return y, bound


def stacked(rng: np.random.Generator, experts_: int, d: int, inner: int, block: int, size: float = 0.3):
    """Random expert weights: the definition's gate, up, down and the operator's initializers."""
    gate, up = (rng.standard_normal((experts_, inner, d)) * size for _ in range(2))
    down = Weight.of(rng.standard_normal((experts_, d, inner)) * size, block)
    both = Weight.of(interleave_gate_up(gate, up), block)
    values = both.values.reshape(experts_, inner // 16, 2, 16, d)
    parts = (np.ascontiguousarray(values[:, :, i]).reshape(experts_, inner, d) for i in (0, 1))
    fixed = {"gu": both.tiles, "gus": both.scales, "dn": down.tiles, "dns": down.scales}
    return (*parts, down.values), fixed
