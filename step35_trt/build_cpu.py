"""The files of a bundle that ONNX Runtime runs on a CPU: compiled operators, packed weights and graphs."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

import onnx_ir as ir

from step35_trt.build_steps import BuildStep, Contents, bytes_step, weights_step
from step35_trt.bundle import KERNELS, PROGRAM
from step35_trt.cpu_library import compile_library
from step35_trt.dialects.onnx import Spelling, decoder_graph, mtp_graph
from step35_trt.dialects.onnx_cpu import CpuSpelling
from step35_trt.dialects.onnx_ort import OrtSpelling
from step35_trt.dialects.onnx_round import round_graph
from step35_trt.program import Program, Segment
from step35_trt.weight_store import WeightStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from step35_trt.checkpoint import Checkpoint
    from step35_trt.config import Step35Config
    from step35_trt.dialects.onnx_graph import GraphWriter
    from step35_trt.quantize.recipe import Recipe


def cpu_contents(source: Checkpoint, recipe: Recipe) -> Contents:
    """Every file but the manifest and the tokenizer."""
    spelling = CpuSpelling(OrtSpelling(int8_activations=recipe.activations == "int8"))
    store = WeightStore(source, recipe, spelling.layout)
    graphs = _graphs(source.config, store, spelling)
    rounds = {
        f"round-{depth}.onnx": round_graph(source.config, store, spelling, depth)
        for depth in range(1, 1 + source.config.num_nextn_predict_layers)
    }
    library = f"{KERNELS}/step35-cpu-{platform.machine()}.so"
    # A missing compiler is better said before the long part.
    steps = [_library_step(library), *_model_steps(source.config, store, graphs, library, rounds)]
    return Contents(tuple(steps), _notes(source.config, graphs, store))


def exported_steps(source: Checkpoint, recipe: Recipe, spelling: Spelling) -> list[BuildStep]:
    """The graphs of a spelling and what they need, without operators of our own."""
    store = WeightStore(source, recipe, spelling.layout)
    return _model_steps(source.config, store, _graphs(source.config, store, spelling), None, {})


def _graphs(config: Step35Config, store: WeightStore, spelling: Spelling) -> dict[str, GraphWriter]:
    graphs = {"decoder.onnx": decoder_graph(config, store, spelling)}
    for module in range(config.num_nextn_predict_layers):
        graphs[f"mtp-{module}.onnx"] = mtp_graph(config, store, spelling, module)
    return graphs


def _model_steps(
    config: Step35Config,
    store: WeightStore,
    graphs: dict[str, GraphWriter],
    library: str | None,
    rounds: dict[str, GraphWriter],
) -> list[BuildStep]:
    """Weights, graphs and the program over them."""
    program = _program(config, graphs, library, tuple(rounds)).model_dump_json(indent=1).encode()
    weights = [weights_step(file) for file in store.files.values()]
    written = [_graph_step(name, graph) for name, graph in (graphs | rounds).items()]
    return [*weights, *written, bytes_step(PROGRAM, program)]


def _program(
    config: Step35Config, graphs: dict[str, GraphWriter], library: str | None, rounds: tuple[str, ...]
) -> Program:
    segments = [
        Segment(
            file=name,
            library=library,
            caches=tuple(graph.caches),
            dense_bytes=graph.bytes_read("all"),
            expert_bytes=graph.bytes_read("experts") // config.moe_num_experts,
            top_k=config.moe_top_k,
        )
        for name, graph in graphs.items()
    ]
    modules = tuple((segment,) for segment in segments[1:])
    return Program(decoder=(segments[0],), mtp=modules, rounds=rounds)


def _notes(config: Step35Config, graphs: dict[str, GraphWriter], store: WeightStore) -> tuple[str, ...]:
    notes = [
        f"{name} stays in fp32: no block of 16 or more divides its width" for name in sorted(store.uncut)
    ]
    moved = any(node.op_type in ("MoE", "QMoE") for graph in graphs.values() for node in graph.tape.nodes)
    clamped = ", ".join(str(layer.index) for layer in config.layers if layer.moe and layer.routed_limit)
    if moved and clamped:  # our own operators clamp as Step does
        notes.append(
            f"layers {clamped}: the experts' clamp after SiLU is computed as an equal clamp before it, with "
            "the up rows stretched and the down rows shrunk by the same factor (specification 2.7)"
        )
    return tuple(notes)


def _library_step(name: str) -> BuildStep:
    def write(path: Path) -> Iterator[int]:
        compile_library(path, platform.machine())
        yield 0

    return BuildStep(name, 0, write)


def _graph_step(name: str, graph: GraphWriter) -> BuildStep:
    def write(path: Path) -> Iterator[int]:
        ir.save(graph.model(name.removesuffix(".onnx")), path)
        yield path.stat().st_size

    return BuildStep(name, 0, write)
