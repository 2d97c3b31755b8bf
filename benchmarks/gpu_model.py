"""The whole model on one GPU, in stages of at most eight minutes each.

    python -m benchmarks.gpu_model check     nano: greedy tokens against the CPU's, graphs against plain runs
    python -m benchmarks.gpu_model slice     real width, few layers: logits against the fp32 oracle
    python -m benchmarks.gpu_model decode    all layers, random codes: tokens/s by batch and context
    python -m benchmarks.gpu_model drafts    what K drafts cost, and the speed-ups at given acceptances
    python -m benchmarks.gpu_model prefill   8K tokens of prompt

    --device cpu dry-runs a stage on a model of nano's size, in plain torch: it proves the script, not speed.

Each result is a line of JSON on stdout; a table of them follows on stderr. Of the model's decoding steps the
time is that of a graph's replay, the greedy choice not included, but for whole rounds of drafts, which are
timed on the host; ratios are to bandwidth and matrix products
measured in the same run. Weights are random codes made on the device in the engine's precisions; keys and
values are random too, since attention's time does not depend on them.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import Tokenizer

from benchmarks.gpu_rounds import Rounds
from benchmarks.gpu_sources import CheckpointSource, DecodedWeights, RandomSource
from benchmarks.kernels import Budget
from benchmarks.spark_slice import slice_config
from step35_trt.checkpoint import Checkpoint, expected_tensors
from step35_trt.config import Step35Config
from step35_trt.engine import EngineSpec
from step35_trt.gpu_forms import deployed_forms
from step35_trt.lower import ModelPrograms
from step35_trt.quantize.recipe import Recipe
from step35_trt.resources import NANO, PUBLISHED
from step35_trt.runtime.cache.cache_extent import Extent
from step35_trt.runtime.device.device_shapes import Shape
from step35_trt.runtime.programs.orders import DECODER, StepOrder
from step35_trt.runtime.programs.program_torch import TorchExecutor
from step35_trt.runtime.programs.rank_runner import RankRunner
from step35_trt.runtime.programs.torch_segments import TorchSegments
from step35_trt.runtime.session_cuda import device_runner, device_weights, load
from step35_trt.runtime.session_program import ProgramSession
from step35_trt.runtime.session_torch import TorchSession
from step35_trt.weight_forms import Forms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from step35_trt.runtime.device.device_runner import DeviceRunner
    from step35_trt.runtime.device.device_weights import DeviceWeights, WeightSource
    from step35_trt.runtime.session import Session
    from step35_trt.runtime.session_program import Runner

ENGINE = "h200-int4"
MINUTES = 7.0  # of eight: the rest is for the start of the process
ACCEPTANCES = ((0.85, 0.75, 0.65),)
SPARE = 4e9  # bytes that a run needs beside weights and caches: activations, graphs, libraries
PAGES = torch.bfloat16
WITHIN = 1.5  # times the error of the definition in bf16, which rounds as often, elsewhere
PROMPT = "import os\n\n\ndef read(self, size=-1):\n"


@dataclass(frozen=True)
class Scale:
    """How large a run is.

    Attributes:
        config: The model that is timed.
        part: A few layers of it, for the comparison with the oracle.
        batches: Sequences that are decoded together.
        contexts: Rows that each has.
        prompt: Tokens that are prefilled.
        chunk: In calls of so many.
        compared: Tokens that are compared.
        repeats: Of each timed call.
    """

    config: Step35Config
    part: Step35Config
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prompt: int
    chunk: int
    compared: int
    repeats: int


@dataclass(frozen=True)
class Card:
    """What the device reaches in this run: bytes/s copied (read plus written), bf16 operations/s."""

    name: str
    bandwidth: float
    matmul: float

    @classmethod
    def measure(cls, device: torch.device) -> Card:
        """Measure it; on a CPU in a size that takes no time."""
        if device.type == "cuda":
            from step35_trt.kernels.timing import Card as Measured

            found = Measured.measure(device)
            return cls(found.name, found.copy_bandwidth, found.matmul_rate)
        source, n = torch.ones(1 << 24, dtype=torch.uint8), 256
        target, a = torch.empty_like(source), torch.randn(n, n)
        copying = timed(lambda: target.copy_(source), device, 5)
        return cls("CPU", 2 * len(source) / copying, 2 * n**3 / timed(lambda: a @ a, device, 5))


def whole() -> Scale:
    """The model as it is."""
    config = Step35Config.load(PUBLISHED)
    part = Step35Config.parse(slice_config(5))
    chunk = EngineSpec.load(ENGINE).prefill_chunk
    return Scale(config, part, (1, 8, 64), (8192, 65536), 8192, chunk, 256, 30)


def dry() -> Scale:
    """Nano with experts as wide as int4 takes them."""
    config = Step35Config.load(NANO).model_copy(update={"moe_intermediate_size": 128})
    return Scale(config, config, (1, 3), (200,), 96, 32, 40, 2)


def check(scale: Scale, device: torch.device, budget: Budget) -> Iterator[dict[str, Any]]:
    """Nano on the device, with graphs and without, and on the CPU by the definition.

    Activations and pages are fp32, so that greedy tokens can be compared; kernels multiply experts in bf16.
    """
    checkpoint = Checkpoint.open(NANO)
    forms = Forms.of(Recipe.load("fp32"), expected_tensors(checkpoint.config))
    made = ModelPrograms.of(checkpoint.config, forms)
    source, cpu = partial(CheckpointSource, checkpoint, forms), torch.device("cpu")
    weights, extent = device_weights(made, source(device), device), Extent(2, 512, 64)
    tokenizer = Tokenizer.from_file(str(NANO / "tokenizer.json"))
    prompt = np.array(tokenizer.encode(PROMPT, add_special_tokens=False).ids)

    def session(runner: Runner) -> ProgramSession:
        return ProgramSession(checkpoint.config, runner, extent.rows, extent.call, extent.slots)

    recorded = device_runner(checkpoint.config, made, weights, extent, torch.float32)
    eager = replace(recorded, record=None)
    plain = device_weights(made, source(cpu), cpu)
    executor = TorchExecutor(TorchSegments(made.segments, plain), plain)
    want, margins = greedy(session(RankRunner(executor, made.programs)), prompt, scale.compared)
    got, _ = greedy(session(recorded), prompt, scale.compared)
    first = next((i for i, pair in enumerate(zip(got, want, strict=True)) if pair[0] != pair[1]), None)
    yield {
        "stage": "check",
        "tokens": scale.compared,
        "equal_to_cpu": first is None,
        "first_difference": first,
        # Where two tokens are as good as equal, another order of additions may take the other.
        "cpu_margin_there": None if first is None else margins[first],
        "least_cpu_margin": min(margins),
        "graphs_equal_eager": got == greedy(session(eager), prompt, scale.compared)[0],
    }


def greedy(session: Session, prompt: np.ndarray, count: int) -> tuple[list[int], list[float]]:
    """The next `count` tokens, and by how much each was better than the second best."""
    sequence, chunk, tokens, margins = session.open(), session.prefill_chunk, [], []
    for start in range(0, len(prompt), chunk):
        part = prompt[start : start + chunk]
        logits = sequence.decode(part, np.array([len(part) - 1])).logits[0]
    for _ in range(count):
        second, best = np.sort(logits)[-2:]
        tokens.append(int(logits.argmax()))
        margins.append(float(best - second))
        logits = sequence.decode(np.array(tokens[-1:]), np.array([0])).logits[0]
    return tokens, margins


def slice_stage(scale: Scale, device: torch.device, budget: Budget) -> Iterator[dict[str, Any]]:
    """The same random codes multiplied by the device's kernels in bf16, and in fp32 by the definition.

    How far bf16 may be from fp32 is what the definition's own bf16 run shows: where a choice of experts is
    close, either may choose others, so single rows differ much and medians are compared.
    """
    model = Model.of(scale.part, device)
    ids = np.random.default_rng(1).integers(0, scale.part.vocab_size, scale.compared)
    extent = Extent(1, scale.compared + 8, scale.chunk)
    runner = device_runner(scale.part, model.made, model.weights, extent, PAGES)
    ours = logits(ProgramSession(scale.part, runner, extent.rows, scale.chunk, 1), ids)
    exact, plain = (
        logits(
            TorchSession(scale.part, DecodedWeights(model.source, model.made.forms, dtype), scale.chunk), ids
        )
        for dtype in (torch.float32, torch.bfloat16)
    )
    errors = [np.sqrt(((x - exact) ** 2).mean(1) / (exact**2).mean(1)) for x in (ours, plain)]
    medians = [float(np.median(error)) for error in errors]
    yield {
        "stage": "slice",
        "layers": len(scale.part.layers),
        "tokens": len(ids),
        "median_error": medians[0],
        "median_error_plain_bf16": medians[1],
        "largest_error": float(errors[0].max()),
        "largest_error_plain_bf16": float(errors[1].max()),
        "same_best_token": float((ours.argmax(1) == exact.argmax(1)).mean()),
        "same_best_token_plain_bf16": float((plain.argmax(1) == exact.argmax(1)).mean()),
        "within_bf16": bool(medians[0] <= WITHIN * medians[1]),
    }


def logits(session: Session, ids: np.ndarray) -> np.ndarray:
    """Of all rows: most in chunks, the last ones a token at a time."""
    sequence, found, start = session.open(), [], 0
    while start < len(ids):
        size = min(session.prefill_chunk, len(ids) - 8 - start) if start < len(ids) - 8 else 1
        found.append(sequence.decode(ids[start : start + size], np.arange(size)).logits)
        start += size
    return np.concatenate(found)


@dataclass(frozen=True)
class Model:
    """Random weights of a model in the engine's precisions."""

    config: Step35Config
    made: ModelPrograms
    source: WeightSource
    weights: DeviceWeights

    @classmethod
    def of(cls, config: Step35Config, device: torch.device) -> Model:
        """None of them made yet."""
        forms, formats = deployed_forms(Recipe.load(EngineSpec.load(ENGINE).recipe), config)
        made = ModelPrograms.of(config, forms)
        source = RandomSource(made.forms, formats, device)
        return cls(config, made, source, device_weights(made, source, device))

    def runner(self, slots: int, rows: int, call: int) -> DeviceRunner | None:
        """With caches of random numbers; None where they do not fit beside the weights."""
        extent, device = Extent(slots, rows, call), self.weights.device
        layers = (*self.config.layers, *self.config.mtp_layers)
        if device.type == "cuda":
            gc.collect()  # caches of the runner before, should anything refer to itself
            torch.cuda.empty_cache()
            if extent.nbytes(layers, PAGES.itemsize) + SPARE > torch.cuda.mem_get_info(device)[0]:
                return None
        found = device_runner(self.config, self.made, self.weights, extent, PAGES)
        for kept in (found.kernels.caches.keys, found.kernels.caches.values):
            for pages in kept.values():
                pages.normal_()
        return found

    def bytes(self, graph: int, tokens: int, context: int, sequences: int) -> float:
        """That a step has to read or write at least."""
        return sum(s.cost.bytes(tokens, context, sequences) for s in self.made.programs[graph].steps)


def loaded(scale: Scale, device: torch.device) -> tuple[Model, dict[str, Any]]:
    """The whole model on the device, and what that took."""
    started = time.perf_counter()
    model = Model.of(scale.config, device)
    runner = device_runner(scale.config, model.made, model.weights, Extent(1, 128, 8), PAGES)
    load(runner)
    used = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
    seconds = time.perf_counter() - started
    return model, {"stage": "load", "bytes": used, "seconds": seconds, "layers": len(scale.config.layers)}


def decode_stage(scale: Scale, device: torch.device, budget: Budget) -> Iterator[dict[str, Any]]:
    """Tokens/s by batch and context, against reading what a step has to read."""
    card = Card.measure(device)
    yield {"stage": "card", "name": card.name, "bandwidth": card.bandwidth, "matmul": card.matmul}
    model, took = loaded(scale, device)
    yield took
    for context in scale.contexts:
        for batch in scale.batches:
            line: dict[str, Any] = {"stage": "decode", "batch": batch, "context": context}
            if not budget.admits_another():
                yield {**line, "left_out": "time"}
                continue
            started = time.monotonic()
            runner = model.runner(batch, context + 8, 8)
            if runner is None:
                yield {**line, "left_out": "keys and values do not fit beside the weights"}
                continue
            seconds = step_seconds(runner, DECODER, batch, 1, context, scale.repeats)
            least = model.bytes(DECODER, batch, context, batch) / card.bandwidth
            yield {
                **line,
                "ms": seconds * 1e3,
                "tokens_per_second": batch / seconds,
                "roofline_ms": least * 1e3,
                "of_roofline": least / seconds,
            }
            del runner
            budget.took(time.monotonic() - started)


def drafts_stage(scale: Scale, device: torch.device, budget: Budget) -> Iterator[dict[str, Any]]:
    """A round of K drafts: the decoder on K + 1 tokens a sequence, module k on k + 1 rows.

    A round gives one token and each draft that is right with all before it. `round_ms` is what a session
    takes for it, from its call to the ids on the host; `steps_ms` the same by steps whose logits and hidden
    rows come to the host; the other two are the times of the recordings alone.
    """
    model, took = loaded(scale, device)
    yield took
    context = scale.contexts[0]
    for batch in scale.batches[:2]:
        runner = model.runner(batch, context + 8, 8)
        if runner is None or not budget.admits_another():
            yield {"stage": "drafts", "batch": batch, "context": context, "left_out": "memory or time"}
            continue
        started, alone = time.monotonic(), 0.0
        rounds = Rounds.of(scale.config, runner, context)
        for k in range(min(3, len(model.made.mtp)) + 1):
            decoder = step_seconds(runner, DECODER, batch, k + 1, context, scale.repeats)
            modules = sum(
                step_seconds(runner, 1 + module, batch, module + 1, context, scale.repeats)
                for module in range(k)
            )
            whole = rounds.seconds(rounds.at_once, k, scale.repeats)
            steps = rounds.seconds(rounds.by_steps, k, scale.repeats)
            alone = alone or whole
            line = {
                "stage": "drafts",
                "batch": batch,
                "context": context,
                "drafts": k,
                "decoder_ms": decoder * 1e3,
                "modules_ms": modules * 1e3,
                "round_ms": whole * 1e3,
                "steps_ms": steps * 1e3,
                "cost": whole / alone,
                "cost_by_steps": steps / alone,
            }
            for rates in ACCEPTANCES:
                expected = 1.0 + float(np.cumprod(rates[:k]).sum())
                line["speed_up_at_" + "_".join(map(str, rates))] = expected * alone / whole
            yield line
        del runner, rounds
        budget.took(time.monotonic() - started)


def prefill_stage(scale: Scale, device: torch.device, budget: Budget) -> Iterator[dict[str, Any]]:
    """A prompt in chunks, from ids on the host to the last row's logits on the host."""
    card = Card.measure(device)
    yield {"stage": "card", "name": card.name, "bandwidth": card.bandwidth, "matmul": card.matmul}
    model, took = loaded(scale, device)
    yield took
    runner = model.runner(1, scale.prompt + 8, scale.chunk)
    assert runner is not None
    ids = np.random.default_rng(2).integers(0, scale.config.vocab_size, scale.prompt)
    starts = range(0, scale.prompt, scale.chunk)

    def prompt() -> None:
        for start in starts:
            part = ids[start : start + scale.chunk]
            last = np.array([len(part) - 1])
            runner.run(StepOrder(DECODER, (0,), (start,), (len(part),), part, last))[0].cpu()

    prompt()
    seconds = min(timed(prompt, device, 1) for _ in range(2))
    flops = 0.0
    for start in starts:
        size = min(scale.chunk, scale.prompt - start)
        flops += sum(step.cost.flops(size, start + size // 2) for step in model.made.decoder.steps)
    yield {
        "stage": "prefill",
        "tokens": scale.prompt,
        "chunk": scale.chunk,
        "seconds": seconds,
        "tokens_per_second": scale.prompt / seconds,
        "of_matmul_rate": flops / seconds / card.matmul,
    }


def step_seconds(
    runner: DeviceRunner, graph: int, sequences: int, each: int, context: int, repeats: int
) -> float:
    """Median time of a decoding step of `each` tokens of all sequences, recorded where that is possible."""
    tokens = sequences * each
    shape = Shape(graph, tokens, tokens if graph == DECODER else sequences, sequences)
    rng = np.random.default_rng(tokens)
    ids = rng.integers(0, runner.executor.weights.tensor("model.embed_tokens.weight").shape[0], tokens)
    rows = np.arange(shape.rows) * (tokens // shape.rows)
    starts, slots = np.arange(sequences + 1) * each, np.arange(sequences)
    owners = np.repeat(slots, each)
    pasts = np.full(sequences, context)
    with torch.inference_mode():
        placed = runner.placed(shape)
        if placed.carried is not None:
            placed.carried.normal_()
        runner.send(placed, np.concatenate([ids, rows, starts, pasts, slots, owners]))
        runner.decode(shape)
        return timed(lambda: runner.decode(shape), runner.device, repeats)


def timed(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of a call; on a GPU between events on its stream."""
    found: list[float] = []
    for _ in range(repeats):
        if device.type == "cuda":
            first, last = (
                torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                for _ in range(2)
            )
            first.record()
            call()
            last.record()
            last.synchronize()
            found.append(first.elapsed_time(last) / 1e3)
        else:
            started = time.perf_counter()
            call()
            found.append(time.perf_counter() - started)
    return statistics.median(found)


STAGES = {
    "check": check,
    "slice": slice_stage,
    "decode": decode_stage,
    "drafts": drafts_stage,
    "prefill": prefill_stage,
}


def table(lines: list[dict[str, Any]]) -> str:
    """The lines for people."""

    def said(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return "\n".join("  ".join(f"{key} {said(value)}" for key, value in line.items()) for line in lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="+", choices=STAGES)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--batches", type=int, nargs="+", help="instead of 1, 8 and 64")
    parser.add_argument("--contexts", type=int, nargs="+", help="instead of 8192 and 65536")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="left out is what takes longer")
    options = parser.parse_args(arguments)
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    scale, budget, lines = dry() if device.type == "cpu" else whole(), Budget(options.minutes), []
    scale = replace(
        scale,
        batches=tuple(options.batches or scale.batches),
        contexts=tuple(options.contexts or scale.contexts),
    )
    for name in options.stages:
        for line in STAGES[name](scale, device, budget):
            lines.append({**line, "device": options.device})
            print(json.dumps(lines[-1]), flush=True)
    print(table(lines), file=sys.stderr)


if __name__ == "__main__":
    main()
