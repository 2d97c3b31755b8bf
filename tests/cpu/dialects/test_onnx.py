"""The onnx dialect in its spellings: valid graphs, the oracle's numbers, and sparse routing."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx.shape_inference
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from step35_trt.checkpoint import Checkpoint
from step35_trt.dialects.onnx import OnnxOps
from step35_trt.dialects.onnx_ort import OrtSpelling, inverse_silu
from step35_trt.dialects.onnx_standard import StandardSpelling
from step35_trt.evaluate import evaluate
from step35_trt.quantize.blocks import block_size, quantize_blocks
from step35_trt.quantize.recipe import Recipe
from step35_trt.runtime.load import open_bundle
from step35_trt.runtime.session_torch import TorchSession
from step35_trt.weight_store import BITS
from tests.bundles import record_again
from tests.codes import dequantize_blocks
from tests.cpu.conftest import GEOMETRIES
from tests.cpu.dialects.test_torch import expected, relative
from tests.engines import engine, exported
from tests.exports import ExportedSession
from tests.synthetic import raw_config, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from step35_trt.evaluate import Evaluation
    from step35_trt.runtime.session import Session

pytestmark = pytest.mark.early

LENGTH = 60  # more than seven windows of the small geometry


@pytest.fixture(scope="module")
def sessions(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Session]:
    """Every spelling of each geometry, in fp32."""
    root = tmp_path_factory.mktemp("sessions")
    exports = {"ort": OrtSpelling(int8_activations=False), "standard": StandardSpelling()}
    made: dict[str, Session] = {}
    for geometry, checkpoint in checkpoints.items():
        for ops, spelling in exports.items():
            made[f"{ops} {geometry}"] = exported(checkpoint, root / f"{ops}-{geometry}", spelling, "fp32")
        made[f"cpu {geometry}"] = engine(checkpoint, root / f"cpu-{geometry}")
    return made


def with_spare(session: Session, rows: int) -> Session:
    """The same graphs over window caches with so many rows to spare, where they have such."""
    return replace(session, spare=rows) if isinstance(session, ExportedSession) else session


NAMES = [f"{ops} {geometry}" for ops in ("ort", "standard", "cpu") for geometry in GEOMETRIES]


@pytest.fixture(scope="module")
def wanted(checkpoints: dict[str, Path]) -> dict[str, tuple[np.ndarray, Evaluation]]:
    """Tokens of each geometry and what transformers makes of them."""
    results = {}
    for geometry, directory in checkpoints.items():
        vocabulary = Checkpoint.open(directory).config.vocab_size
        ids = np.random.default_rng(4).integers(0, vocabulary, LENGTH)
        results[geometry] = ids, expected(directory, ids)
    return results


@pytest.mark.parametrize("name", NAMES)
def test_matches_transformers(
    sessions: dict[str, Session], wanted: dict[str, tuple[np.ndarray, Evaluation]], name: str
) -> None:
    ids, want = wanted[name.split()[1]]
    got = evaluate(sessions[name], ids)
    assert relative(got.logits, want.logits) < 1e-4
    assert relative(got.hidden, want.hidden) < 1e-4
    for k in range(3):
        assert relative(got.mtp_logits[k, : -1 - k], want.mtp_logits[k, : -1 - k]) < 1e-4


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_split_and_rollback(
    sessions: dict[str, Session],
    wanted: dict[str, tuple[np.ndarray, Evaluation]],
    name: str,
    data: st.DataObject,
) -> None:
    """Chunks of any size, each followed by drafts that are taken back; decoder and modules alike."""
    ids, want = wanted[name.split()[1]]
    # Few spare rows: the runtime's window cache moves its rows many times in a short text.
    session = with_spare(sessions[name], data.draw(st.integers(0, 20)))
    vocabulary = session.config.vocab_size
    sequence, done, logits = session.open(), 0, []
    while done < LENGTH:
        size = data.draw(st.one_of(st.just(1), st.integers(1, LENGTH - done)))
        junk = data.draw(st.lists(st.integers(0, vocabulary - 1), max_size=4))
        step = sequence.decode(np.array([*ids[done : done + size], *junk]), np.arange(size))
        logits.append(step.logits)
        done += size
        sequence.truncate(done)
        assert sequence.length == done
    assert relative(np.concatenate(logits), want.logits) < 1e-4
    rows, done, parts = LENGTH - 1, 0, []
    while done < rows:
        size = data.draw(st.integers(1, rows - done))
        extra = data.draw(st.integers(0, 3))
        hidden = np.concatenate([want.hidden[done : done + size], np.ones((extra, want.hidden.shape[1]))])
        taken = np.concatenate([ids[done + 1 : done + 1 + size], np.zeros(extra, np.int64)])
        parts.append(sequence.draft(0, taken, hidden.astype(np.float32), np.arange(size)).logits)
        done += size
        sequence.truncate_draft(0, done)
        assert sequence.draft_length(0) == done
    assert relative(np.concatenate(parts), want.mtp_logits[0, :rows]) < 1e-4


@pytest.mark.parametrize("ops", ["ort", "standard", "cpu"])
def test_token_by_token(
    sessions: dict[str, Session],
    wanted: dict[str, tuple[np.ndarray, Evaluation]],
    ops: str,
) -> None:
    ids, want = wanted["small-window"]
    sequence = with_spare(sessions[f"{ops} small-window"], 4).open()
    got = [sequence.decode(ids[i : i + 1], np.array([0])).logits for i in range(LENGTH)]
    assert relative(np.concatenate(got), want.logits) < 1e-4


def missing_plus_one(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(OnnxOps, "plus_one", lambda _self, vector: vector)


def clamp_before_silu(patch: pytest.MonkeyPatch) -> None:
    """What the runtime's operator does when it is handed Step's limit as it is."""
    import step35_trt.dialects.onnx_ort as dialect

    patch.setattr(dialect, "inverse_silu", lambda limit: limit)


def window_513(patch: pytest.MonkeyPatch) -> None:
    import step35_trt.dialects.onnx_ort as dialect

    attend = dialect._attend

    def wider(g, heads, layer):  # type: ignore[no-untyped-def]
        return attend(g, heads, replace(layer, window=layer.window + 1 if layer.window else 0))

    patch.setattr(dialect, "_attend", wider)


@pytest.mark.parametrize("mistake", [missing_plus_one, clamp_before_silu, window_513])
def test_a_mistake_shows(
    checkpoints: dict[str, Path],
    wanted: dict[str, tuple[np.ndarray, Evaluation]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mistake: object,
) -> None:
    ids, want = wanted["small-window"]
    assert callable(mistake)
    mistake(monkeypatch)
    spelling = OrtSpelling(int8_activations=False)
    got = evaluate(exported(checkpoints["small-window"], tmp_path / "out", spelling, "fp32"), ids)
    assert relative(got.hidden, want.hidden) > 1e-3


@pytest.mark.parametrize("limit", [0.3, 0.7, 1.6, 7.0, 16.0])
def test_the_clamp_moved_before_silu_is_the_same_function(limit: float) -> None:
    """The identity behind the operators' use, on values around both limits, in fp64."""
    gate = np.concatenate([np.linspace(-20, 20, 4001), limit + np.linspace(-1e-3, 1e-3, 101)])
    up = np.concatenate([np.linspace(-3 * limit, 3 * limit, 4001), np.full(101, -limit)])
    before = inverse_silu(limit)

    def silu(x: np.ndarray) -> np.ndarray:
        return x / (1 + np.exp(-x))

    stretch = before / limit
    moved = silu(np.minimum(gate, before)) * np.clip(up * stretch, -before, before) / stretch
    step = np.minimum(silu(gate), limit) * np.clip(up, -limit, limit)
    np.testing.assert_allclose(moved, step, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_graphs_are_valid_and_hold_no_weights(
    sessions: dict[str, Session], name: str, tmp_path: Path
) -> None:
    directory = sessions[name].directory  # type: ignore[attr-defined]
    graphs = sorted(directory.glob("*.onnx"))
    rounds = [f"round-{depth}.onnx" for depth in (1, 2, 3) if name.startswith("cpu")]
    modules = [f"mtp-{module}.onnx" for module in range(3)]
    assert [graph.name for graph in graphs] == ["decoder.onnx", *modules, *rounds]
    for graph in graphs:
        onnx.checker.check_model(str(graph), full_check=True)
        onnx.shape_inference.infer_shapes_path(
            str(graph), str(tmp_path / "inferred.onnx"), check_type=True, strict_mode=True, data_prop=True
        )
        model = onnx.load(graph, load_external_data=False)
        domains = {opset.domain: opset.version for opset in model.opset_import}
        foreign = {"standard": [], "ort": ["com.microsoft"], "cpu": ["com.microsoft", "step35"]}
        assert domains == {"": 24} | dict.fromkeys(foreign[name.split(maxsplit=1)[0]], 1)
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                entry = {item.key: item.value for item in tensor.external_data}
                assert int(entry["offset"]) % 4096 == 0
                assert (directory / entry["location"]).is_file()
            else:
                assert len(tensor.SerializeToString()) < 1100


@pytest.mark.parametrize("where", ["bundle", "export"])
def test_quantised_graphs_are_valid(checkpoints: dict[str, Path], tmp_path: Path, where: str) -> None:
    """Ours for the engine; MatMulNBits and QMoE where only the runtime's own may be used."""
    if where == "bundle":
        engine(checkpoints["small-window"], tmp_path / "out", "cpu-int4")
        domains, kinds = {"", "com.microsoft", "step35"}, {"Chain"}
    else:
        exported(
            checkpoints["small-window"], tmp_path / "out", OrtSpelling(int8_activations=True), "cpu-int4"
        )
        domains, kinds = {"", "com.microsoft"}, {"MatMulNBits", "QMoE"}
    for graph in (tmp_path / "out").glob("*.onnx"):
        onnx.checker.check_model(str(graph), full_check=True)
        onnx.shape_inference.infer_shapes_path(
            str(graph), str(tmp_path / "inferred.onnx"), check_type=True, strict_mode=True, data_prop=True
        )
        model = onnx.load(graph, load_external_data=False)
        assert {opset.domain for opset in model.opset_import} == domains
        used = {node.op_type for node in model.graph.node}
        missing = set() if graph.name == "decoder.onnx" else {"QMoE"} & kinds
        assert kinds - used == missing
        # Where no 4-bit product follows directly there is no chain to take it.
        chained = (where, graph.name) == ("bundle", "decoder.onnx")
        assert ("GatherBlockQuantized" in used) != chained
        assert "GatedAttention" not in used  # part of a chain
        chains = [node.name for node in model.graph.node if node.op_type == "Chain"]
        assert set(chains) == ({f"chain.{i}" for i in range(len(chains))} if where == "bundle" else set())


@dataclass(frozen=True)
class Dequantised:
    """`Weights` of the torch dialect as the recipe's codes and scales say."""

    checkpoint: Checkpoint
    recipe: Recipe
    common: int  # the experts' block divides both their widths

    def tensor(self, name: str) -> torch.Tensor:
        return self._coded(name, self.checkpoint.read(name))

    def expert(self, name: str, index: int) -> torch.Tensor:
        return self._coded(name, self.checkpoint.read(name, index))

    def _coded(self, name: str, value: np.ndarray) -> torch.Tensor:
        rule = self.recipe.rule(name)
        if value.ndim > 1 and rule.precision != "fp32":
            width = value.shape[-1] if ".moe." not in name else self.common
            bits = BITS[rule.precision]
            codes, scales = quantize_blocks(value, bits, block_size(rule.block, width))
            value = dequantize_blocks(codes, scales.astype(np.float16).astype(np.float32), bits)
        return torch.from_numpy(value)


@pytest.mark.parametrize("how", ["ours", "runtime", "runtime, fp32 activations"])
def test_int4_is_what_its_codes_say(tmp_path: Path, how: str) -> None:
    """Shallow enough that rounding does not flip the routing: what remains is the activations' int8."""
    raw = raw_config(layers=2, hidden_size=128, moe_intermediate_size=64)
    source = write_checkpoint(tmp_path / "checkpoint", raw)
    checkpoint = Checkpoint.open(source)
    if how == "ours":
        session = engine(source, tmp_path / "out", "cpu-int4")
    else:
        session = exported(source, tmp_path / "out", OrtSpelling("fp32" not in how), "cpu-int4")
    ids = np.random.default_rng(0).integers(0, 97, 24)
    reference = TorchSession(checkpoint.config, Dequantised(checkpoint, Recipe.load("cpu-int4"), 64))
    got, want = evaluate(session, ids), evaluate(reference, ids)
    errors = np.abs(got.hidden - want.hidden).max(-1) / np.abs(want.hidden).max()
    assert np.median(errors) < (0.01 if "fp32" in how else 0.05)
    assert np.median(errors) > 1e-5  # it was quantised


def test_each_weight_is_stored_once(sessions: dict[str, Session], checkpoints: dict[str, Path]) -> None:
    directory = sessions["ort small-window"].directory  # type: ignore[attr-defined]
    stored = sum(file.stat().st_size for file in (directory / "weights").iterdir())
    values = sum(int(np.prod(t.shape)) for t in Checkpoint.open(checkpoints["small-window"]).tensors.values())
    assert values * 4 <= stored < values * 4 * 1.5 + 400 * 4096  # a page at most lost to each tensor


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Wide enough that a dense evaluation would dominate, at 16 and 288 experts."""
    root = tmp_path_factory.mktemp("experts")
    sizes = {"moe_top_k": 8, "moe_intermediate_size": 256, "hidden_size": 256, "layers": 5}
    return {
        count: write_checkpoint(root / str(count), raw_config(moe_num_experts=count, **sizes))
        for count in (16, 288)
    }


@pytest.mark.parametrize("name", ["cpu-fp32", "cpu-int4"])
def test_routing_is_sparse(many: dict[int, Path], tmp_path: Path, name: str) -> None:
    """From 16 to 288 experts the bytes a token reads stay, and the time does not follow the experts."""
    seconds, dense, chosen, sequences = {}, {}, {}, {}
    for count, directory in many.items():
        session = engine(directory, tmp_path / f"{count}", name)
        segment = session.program.decoder[0]  # type: ignore[attr-defined]
        dense[count], chosen[count] = segment.dense_bytes, segment.top_k * segment.expert_bytes
        sequences[count], seconds[count] = session.open(), np.inf
    for token in range(60):  # in turns and at best: other tests run beside this one
        for count, sequence in sequences.items():
            started = time.perf_counter()
            sequence.decode(np.array([token % 97]), np.array([0]))
            seconds[count] = min(seconds[count], time.perf_counter() - started)
    assert chosen[16] == chosen[288]
    assert dense[288] - dense[16] == 2 * 272 * (256 + 1) * 4  # the router's rows and biases of two layers
    assert seconds[288] < 4 * seconds[16]  # 18 times the experts


CHOSEN = (3, 50, 77, 111, 180, 200, 255, 287)


@pytest.mark.parametrize("name", ["cpu-fp32", "cpu-int4"])
def test_unchosen_experts_are_never_touched(tmp_path: Path, name: str) -> None:
    """A bias that decides the choice alone; NaN in all other experts then changes nothing."""
    raw = raw_config(moe_num_experts=288, moe_top_k=8, layers=5, hidden_size=128)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", raw, shards=1)
    file = next(checkpoint.glob("*.safetensors"))
    tensors = load_file(file)
    for bias in (tensors[key] for key in tensors if key.endswith("router_bias")):
        bias[:] = 0
        bias[list(CHOSEN)] = 100
    save_file(tensors, file)
    (checkpoint / "model.safetensors.index.json").unlink()
    ids = np.arange(12)
    want = engine(checkpoint, tmp_path / "bundle", name).open().decode(ids, np.arange(12))
    poison(tmp_path / "bundle", name)
    got = open_bundle(tmp_path / "bundle").open().decode(ids, np.arange(12))
    assert np.isfinite(want.logits).all()
    np.testing.assert_array_equal(got.logits, want.logits)


def poison(bundle: Path, name: str) -> None:
    """NaN into the weights, or the scales, of every expert that is not chosen."""
    suffix = ".scales" if name == "cpu-int4" else ""
    others = [e for e in range(288) if e not in CHOSEN]
    for layer in (3, 4):
        file = bundle / "weights" / f"layer-{layer:02}.safetensors"
        for part in ("gate_up", "down"):
            key = f"model.layers.{layer}.moe.{part}{suffix}"
            with safe_open(file, "numpy") as reader:
                shape = reader.get_slice(key).get_shape()
            size = int.from_bytes(file.read_bytes()[:8], "little")
            offset = json.loads(file.read_bytes()[8 : 8 + size])[key]["data_offsets"][0]
            kind = np.float16 if suffix else np.float32
            values = np.memmap(file, kind, "r+", 8 + size + offset, tuple(shape))
            values[others] = np.nan
            values.flush()
        record_again(bundle, f"weights/{file.name}")
