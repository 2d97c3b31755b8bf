"""Train nano: `python -m step35_trt.nano.train OUTPUT_DIRECTORY` (two cores, under half an hour).

Writes `config.json`, `model.safetensors`, `tokenizer.json` and `tokenizer_config.json`. The same machine and
the same versions of Python and torch give the same files.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch.nn import functional

from step35_trt.config import Step35Config
from step35_trt.nano import corpus, vocabulary
from step35_trt.nano.evaluate import predict, summarise
from step35_trt.nano.geometry import MODULES, raw_config
from step35_trt.nano.parameters import Optimiser, Parameters, balance

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenizers import Tokenizer
    from torch import Tensor

    Loss = Callable[[Parameters, Step35Config, Tensor, float], Tensor]

SEED = 35
DECODER_STEPS, MODULE_STEPS = 1000, 1000
SHORT = (4, 256)  # sequences, tokens: four windows
LONG = (1, 1024)  # sixteen windows
LONG_EVERY = 16
WARM_UP, FALL = 20, 0.6  # steps; share of the steps over which the rates fall to zero
BALANCE_RATE = 0.003
REPORT_EVERY = 25


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train nano.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps, for a trial")
    parser.add_argument("--decoder", type=Path, help="a finished nano whose decoder is kept as it is")
    arguments = parser.parse_args()
    train(arguments.output, arguments.scale, arguments.decoder)


def train(output: Path, scale: float = 1.0, decoder: Path | None = None) -> None:
    """Train and write the four files; prints a summary over held-out text.

    Args:
        output: Where the files go.
        scale: Share of the steps.
        decoder: Only the modules are trained, on this nano's decoder. They come out as they would in a run
            from nothing: the two parts share no random numbers.
    """
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # a tenth of the time
    begun = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = vocabulary.train(document.text for document in corpus.training_documents())
    vocabulary.save(tokenizer, output)
    ends = (vocabulary.END, vocabulary.PAD, vocabulary.TURN_END)
    raw = raw_config([vocabulary.identity(tokenizer, token) for token in ends])
    (output / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    config = Step35Config.parse(raw)

    stream = training_tokens(tokenizer)
    parameters = Parameters.start(config, torch.Generator().manual_seed(SEED))
    prefixes = tuple(f"{layer.prefix}." for layer in config.mtp_layers)
    if decoder is not None:
        finished = load_file(decoder / "model.safetensors")
        with torch.no_grad():
            for name, value in parameters.values.items():
                if not name.startswith(prefixes):
                    value.copy_(finished[name])
        parameters.round()
    courses = ((DECODER_STEPS, decoder_loss, False), (MODULE_STEPS, module_loss, True))
    for steps, loss, modules in courses if decoder is None else courses[1:]:
        trained = {n: v for n, v in parameters.values.items() if n.startswith(prefixes) == modules}
        course = Course(
            parameters, config, loss, Optimiser(trained), Batches(stream, *SHORT), Batches(stream, *LONG)
        )
        for rate in plan(max(1, round(steps * scale))):
            course.step(rate)
            if course.done % REPORT_EVERY == 0:
                print(
                    f"{course.done:5} {course.last_loss:7.4f} {time.monotonic() - begun:7.1f} s", flush=True
                )
                parameters.save(output / "model.safetensors")
        parameters.round()  # the modules learn from the decoder that is shipped
        parameters.save(output / "model.safetensors")
    held_out = corpus.held_out_text()
    ids = torch.tensor(tokenizer.encode(held_out).ids)
    summary = summarise(parameters, config, ids)
    figures = asdict(summary) | {
        "perplexity": summary.perplexity,
        "bits_per_byte": summary.loss / math.log(2) * len(ids) / len(held_out.encode()),
        "parameters": sum(value.numel() for value in parameters.values.values()),
        "bytes": (output / "model.safetensors").stat().st_size,
        "seconds": round(time.monotonic() - begun),
    }
    print(json.dumps(figures, indent=1))


def plan(steps: int) -> list[float]:
    """The share of the peak rates at each step: up, level, down to nothing."""
    return [min(1.0, (i + 1) / WARM_UP, (steps - i) / steps / FALL) for i in range(steps)]


def decoder_loss(parameters: Parameters, config: Step35Config, tokens: Tensor, rate: float) -> Tensor:
    """The decoder against the text; also moves the router biases."""
    said = predict(parameters, config, tokens, 0)
    balance(parameters, said.loads, BALANCE_RATE * rate)
    return _cross_entropy(said.main[:, :-1], tokens[:, 1:])


def module_loss(parameters: Parameters, config: Step35Config, tokens: Tensor, _rate: float) -> Tensor:
    """The modules against what the decoder would choose, which is what decides over a draft."""
    said = predict(parameters, config, tokens, MODULES, frozen_decoder=True)
    own = said.main.argmax(-1)
    return torch.stack([_cross_entropy(d, own[:, 1 + k :]) for k, d in enumerate(said.drafts)]).mean()


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def training_tokens(tokenizer: Tokenizer) -> Tensor:
    """Documents and conversations, each between its begin and end token, in a fixed random order."""
    texts = [f"{document.text}{vocabulary.END}" for document in corpus.training_documents()]
    texts += corpus.conversations()
    random.Random(SEED).shuffle(texts)
    begin = vocabulary.identity(tokenizer, vocabulary.BEGIN)
    encoded = tokenizer.encode_batch(texts)
    return torch.tensor([token for text in encoded for token in (begin, *text.ids)])


@dataclass
class Batches:
    """`count` pieces of `length` tokens at a time, in random order, each once before any comes again."""

    stream: Tensor
    count: int
    length: int
    _random: random.Random = field(default_factory=lambda: random.Random(SEED))
    _starts: list[int] = field(default_factory=list)

    def take(self) -> Tensor:
        """`[count, length]` token ids."""
        if len(self._starts) < self.count:
            shift = self._random.randrange(self.length)
            self._starts = list(range(shift, len(self.stream) - self.length + 1, self.length))
            self._random.shuffle(self._starts)
        starts, self._starts = self._starts[: self.count], self._starts[self.count :]
        return torch.stack([self.stream[start : start + self.length] for start in starts])


@dataclass
class Course:
    """One part of the training, a step at a time."""

    parameters: Parameters
    config: Step35Config
    loss: Loss
    optimiser: Optimiser
    short: Batches
    long: Batches
    done: int = 0
    last_loss: float = math.nan

    def step(self, rate: float) -> None:
        """Learn from one batch at `rate` times the peak rates."""
        self.done += 1
        tokens = (self.short if self.done % LONG_EVERY else self.long).take()
        loss = self.loss(self.parameters, self.config, tokens, rate)
        torch.autograd.backward(loss)
        self.optimiser.step(rate)
        self.parameters.end_step()
        self.last_loss = loss.item()


if __name__ == "__main__":
    main()
