"""nano is what it says: whole, small, trained, with every feature of the large model in use."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from step35_trt import nano
from step35_trt.checkpoint import EXPERT_PROJECTIONS, Checkpoint, expected_tensors
from step35_trt.dialects.checkpoint_weights import CheckpointWeights
from step35_trt.nano import corpus, vocabulary
from step35_trt.nano.parameters import Parameters, balance
from step35_trt.nano.train import Batches, plan
from step35_trt.rotary import inverse_frequencies
from step35_trt.runtime.session_torch import TorchSession

DIRECTORY = Path(nano.__file__).parent
CHUNK, CHUNKS = 512, 3
MOST_PERPLEXITY = 42.0  # a token, of 1024; token frequencies alone reach 400
LEAST_ACCEPTED = (0.62, 0.62, 0.62)


@dataclass(frozen=True)
class Watched:
    """`Weights` that remember which experts were asked for."""

    inner: CheckpointWeights
    asked: set[tuple[str, int]] = field(default_factory=set)

    def tensor(self, name: str) -> torch.Tensor:
        return self.inner.tensor(name)

    def expert(self, name: str, index: int) -> torch.Tensor:
        self.asked.add((name, index))
        return self.inner.expert(name, index)


@dataclass(frozen=True)
class Measured:
    """What `TorchSession` says about held-out text."""

    perplexity: float
    accepted: tuple[float, ...]
    asked: set[tuple[str, int]]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open(DIRECTORY)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DIRECTORY / "tokenizer.json"))


@pytest.fixture(scope="module")
def measured(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Measured:
    weights = Watched(CheckpointWeights(checkpoint))
    session = TorchSession(checkpoint.config, weights)
    ids = np.array(tokenizer.encode(corpus.held_out_text()).ids)
    losses, matches = [], []
    for start in np.linspace(0, len(ids) - CHUNK, CHUNKS).astype(int):
        tokens, sequence = ids[start : start + CHUNK], session.open()
        step = sequence.decode(tokens, np.arange(CHUNK))
        own, hidden = step.logits.argmax(-1), step.hidden
        losses.append(
            torch.nn.functional.cross_entropy(
                torch.from_numpy(step.logits[:-1]), torch.from_numpy(tokens[1:])
            )
        )
        match = []
        for k in range(checkpoint.config.num_nextn_predict_layers):
            rows = CHUNK - 1 - k
            draft = sequence.draft(k, tokens[1 + k :], hidden[:rows], np.arange(rows))
            hidden = draft.hidden
            match.append((draft.logits.argmax(-1) == own[1 + k :]).mean())
        matches.append(match)
    return Measured(
        math.exp(torch.stack(losses).mean().item()), tuple(np.mean(matches, axis=0).tolist()), weights.asked
    )


def test_predicts_held_out_text(measured: Measured) -> None:
    assert measured.perplexity < MOST_PERPLEXITY


@pytest.mark.parametrize("module", range(3))
def test_drafts_what_the_decoder_says(measured: Measured, module: int) -> None:
    assert measured.accepted[module] > LEAST_ACCEPTED[module]


def test_every_expert_is_used(checkpoint: Checkpoint, measured: Measured) -> None:
    config = checkpoint.config
    every = {
        (f"{layer.prefix}.moe.{part}.weight", expert)
        for layer in config.layers
        if layer.moe
        for part in EXPERT_PROJECTIONS
        for expert in range(config.moe_num_experts)
    }
    assert measured.asked == every


def test_files_are_small_and_stored_as_published(checkpoint: Checkpoint) -> None:
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    sizes = [(DIRECTORY / name).stat().st_size for name in names]
    assert sizes[1] <= 10_000_000
    assert sum(file.stat().st_size for file in DIRECTORY.iterdir() if file.is_file()) <= 10 * 2**20
    assert set(checkpoint.tensors) == set(expected_tensors(checkpoint.config))
    for name, tensor in checkpoint.tensors.items():
        assert tensor.dtype == ("F32" if name.endswith("router_bias") else "BF16"), name
        assert np.isfinite(checkpoint.read(name)).all(), name


def test_router_biases_are_trained_and_matter(checkpoint: Checkpoint) -> None:
    for layer in checkpoint.config.layers:
        if layer.moe:
            bias = checkpoint.read(f"{layer.prefix}.moe.router_bias")
            assert bias.std() > 1e-3
            assert len(np.unique(bias)) > 1


def test_modules_are_three_different_ones(checkpoint: Checkpoint) -> None:
    first, *others = (layer.prefix for layer in checkpoint.config.mtp_layers)
    assert len(others) == 2
    for name in checkpoint.tensors:
        if name.startswith(f"{first}."):
            own = [checkpoint.read(name.replace(first, prefix, 1)) for prefix in (first, *others)]
            assert not np.array_equal(own[0], own[1]), name
            assert not np.array_equal(own[0], own[2]), name
            assert not np.array_equal(own[1], own[2]), name
    heads = [f"{p}.transformer.shared_head.output.weight" for p in (first, *others)]
    main = checkpoint.read("lm_head.weight")
    assert all(not np.array_equal(main, checkpoint.read(head)) for head in heads)


def test_config_has_the_published_format_and_every_feature(checkpoint: Checkpoint) -> None:
    raw = json.loads((DIRECTORY / "config.json").read_text())
    for name in (
        "layer_types",
        "rope_theta",
        "partial_rotary_factors",
        "swiglu_limits",
        "swiglu_limits_shared",
    ):
        assert len(raw[name]) == 12, name
    assert isinstance(raw["moe_layers_enum"], str)

    config = checkpoint.config
    layers = (*config.layers, *config.mtp_layers)
    assert [layer.index for layer in layers if not layer.window] == [0, 4, 8]
    assert {layer.window for layer in config.mtp_layers} == {config.sliding_window}
    assert config.max_position_embeddings > 3 * config.sliding_window
    shares = {bool(layer.window): layer.query_heads // layer.kv_heads for layer in layers}
    assert shares == {False: 8, True: 12}
    assert [layer.index for layer in layers if layer.moe] == [3, 4, 5, 6, 7, 8]
    assert {layer.index: layer.routed_limit for layer in layers if layer.routed_limit} == {7: 7.0, 8: 7.0}
    assert {layer.index: layer.shared_limit for layer in layers if layer.shared_limit} == {8: 16.0}
    assert config.moe_router_scaling_factor == 3.0
    for layer in layers:
        assert layer.rotary_dims == (layer.head_dim if layer.window else layer.head_dim // 2)
        assert layer.rope_theta == (1e4 if layer.window else 5e6)
        assert (layer.rope_scaling is None) == bool(layer.window)


def test_all_three_branches_of_the_rotary_scaling_occur(checkpoint: Checkpoint) -> None:
    layer = checkpoint.config.layers[0]
    assert layer.rope_scaling is not None
    exponents = np.arange(0, layer.rotary_dims, 2) / layer.rotary_dims
    divisor = layer.rope_theta**-exponents / inverse_frequencies(layer)
    factor = layer.rope_scaling.factor
    assert np.isclose(divisor, 1, atol=1e-6).any()
    assert np.isclose(divisor, factor, atol=1e-6).any()
    assert ((divisor > 1 + 1e-3) & (divisor < factor - 1e-3)).any()


def test_matrices_can_be_stored_in_blocks_of_32(checkpoint: Checkpoint) -> None:
    for name, tensor in checkpoint.tensors.items():
        assert len(tensor.shape) == 1 or tensor.shape[-1] % 32 == 0, name


def test_tokenizer_fits_the_model(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    config = checkpoint.config
    assert tokenizer.get_vocab_size() == config.vocab_size
    assert config.bos_token_id == tokenizer.token_to_id(vocabulary.BEGIN) == 0
    ends = (vocabulary.END, vocabulary.PAD, vocabulary.TURN_END)
    assert config.eos_token_id == tuple(tokenizer.token_to_id(token) for token in ends)
    text = "naïve\t日本 — 3.14159\r\n\n    return x\x00"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    for token in vocabulary.CONTROL + vocabulary.MARKUP:
        ids = tokenizer.encode(token).ids
        assert len(ids) == 1
        assert tokenizer.decode(ids) == ("" if token in vocabulary.CONTROL else token)


def test_held_out_text_is_not_in_the_training_part() -> None:
    held_out, training = corpus.held_out_documents(), corpus.training_documents()
    assert len(corpus.held_out_text()) > 100_000
    assert sum(len(document.text) for document in training) > 10 * len(corpus.held_out_text())
    assert not {d.name for d in held_out} & {d.name for d in training}
    seen = {key for document in training for key in corpus.paragraph_keys(document.text)}
    assert not any(seen & set(corpus.paragraph_keys(document.text)) for document in held_out)
    everything = "\n\n".join((*(document.text for document in training), *corpus.conversations()))
    text = corpus.held_out_text()
    spans = [text[i : i + 120] for i in range(0, len(text) - 120, 997)]
    # Clients of the standard library share a few lines inside paragraphs that differ.
    assert sum(span in everything for span in spans) <= 0.02 * len(spans)


def test_side_of_a_document_depends_on_its_name_alone() -> None:
    assert corpus.Document("source:mailbox.py", "").held_out
    assert not corpus.Document("source:argparse.py", "any text").held_out


def test_balance_moves_tokens_from_busy_experts_to_idle_ones() -> None:
    parameters = Parameters({"x.moe.router_bias": torch.zeros(3)})
    balance(parameters, {"x.moe": torch.tensor([9, 3, 0])}, 0.5)
    assert parameters.values["x.moe.router_bias"].tolist() == [-0.5, 0.5, 0.5]


def test_plan_rises_stays_and_falls_to_nothing() -> None:
    rates = plan(100)
    assert len(rates) == 100
    assert rates[0] < rates[1] < max(rates) == 1.0
    assert rates.count(1.0) > 10
    assert 0 < rates[-1] < 0.02


def test_batches_show_every_piece_before_any_comes_again() -> None:
    batches = Batches(torch.arange(100), count=2, length=8)
    firsts = [row[0].item() for _ in range(5) for row in batches.take()]
    assert len(set(firsts)) == len(firsts)
    assert all(torch.equal(row, torch.arange(8) + row[0]) for row in batches.take())
