"""config.json: the published spelling is read, the unknown is refused by name."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from step35_trt.config import Step35Config
from step35_trt.errors import CorruptInputError, UnsupportedError
from step35_trt.rotary import inverse_frequencies
from tests.synthetic import raw_config

if TYPE_CHECKING:
    from pathlib import Path


def published() -> dict[str, Any]:
    """The sizes of Step 3.5 Flash in the spelling of its repository (specification 1.1)."""
    full = [i % 4 == 0 for i in range(48)]
    raw = raw_config(layers=45, modules=3, heads=(64, 96), groups=8, head_dim=128)
    raw["rope_scaling"]["original_max_position_embeddings"] = 131072
    return raw | {
        "hidden_size": 4096,
        "intermediate_size": 11264,
        "vocab_size": 128896,
        "max_seq_len": 262144,
        "max_position_embeddings": 262144,
        "sliding_window": 512,
        "moe_num_experts": 288,
        "moe_top_k": 8,
        "moe_intermediate_size": 1280,
        "share_expert_dim": 1280,
        "swiglu_limits": [7.0 if i in (43, 44) else 0.0 for i in range(48)],
        "swiglu_limits_shared": [16.0 if i == 44 else 0.0 for i in range(48)],
        "partial_rotary_factors": [0.5 if f else 1.0 for f in full],
        "eos_token_id": [1, 2, 128007],
    }


def test_published_layers() -> None:
    config = Step35Config.parse(published())
    assert len(config.layers) == 45
    assert len(config.mtp_layers) == 3
    full = [layer.index for layer in config.layers if layer.kind == "full_attention"]
    assert full == list(range(0, 45, 4))
    assert [layer.index for layer in config.layers if not layer.moe] == [0, 1, 2]
    for layer in (*config.layers, *config.mtp_layers):
        is_full = layer.index in full
        assert layer.query_heads == (64 if is_full else 96)
        assert layer.rotary_dims == (64 if is_full else 128)
        assert layer.window == (0 if is_full else 512)
        assert (layer.rope_scaling is not None) == is_full
        assert layer.routed_limit == (7.0 if layer.index in (43, 44) else 0.0)
        assert layer.shared_limit == (16.0 if layer.index == 44 else 0.0)
    assert config.rms_norm_eps == 1e-5


def test_llama3_golden_values() -> None:
    """Specification 2.4: indices 0 to 13 unchanged, 14 to 20 in between, 21 and later halved."""
    layer = Step35Config.parse(published()).layers[0]
    plain = 5e6 ** -(np.arange(0, 64, 2) / 64)
    golden = [1.030196122e-3, 5.268819165e-4, 2.836864388e-4, 1.592908589e-4, 9.230576404e-5, 5.469018104e-5]
    got = inverse_frequencies(layer)
    np.testing.assert_allclose(got[:14], plain[:14], rtol=1e-6)
    np.testing.assert_allclose(got[14:20], golden, rtol=1e-6)
    np.testing.assert_allclose(got[20], 3.289137091e-5, rtol=1e-6)
    np.testing.assert_allclose(got[21:], plain[21:] / 2, rtol=1e-6)


def test_nested_text_config() -> None:
    text = published()
    assert Step35Config.parse({"model_type": "step3p7", "text_config": text}) == Step35Config.parse(text)


def test_fp8_quantization_config() -> None:
    raw = published() | {
        "quantization_config": {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head"],
        }
    }
    config = Step35Config.parse(raw)
    assert config.quantization_config is not None
    assert config.quantization_config.weight_block_size == (128, 128)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"sink": True}, "sink"),
        ({"model_type": "step4"}, "model_type"),
        ({"layer_types": ["linear_attention"] * 12}, "layer_types"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling"),
        ({"moe_router_activation": "softmax"}, "moe_router_activation"),
        ({"use_rope_layers": [True] * 12}, "use_rope_layers"),
        ({"attention_temperature_tuning": True}, "attention_temperature_tuning"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"need_fp32_gate": False}, "need_fp32_gate"),
        ({"zero_centered": False}, "zero_centered"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"att_impl_type": "MLA"}, "att_impl_type"),
    ],
)
def test_unknown_features_are_refused_by_name(change: dict[str, Any], name: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        Step35Config.parse(raw_config() | change)
    assert name in caught.value.message
    assert "\n" not in caught.value.message


def test_a_switched_off_unknown_is_no_feature() -> None:
    assert Step35Config.parse(raw_config() | {"some_new_switch": False}) == Step35Config.parse(raw_config())


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 0},
        {"hidden_size": "many"},
        {"num_hidden_layers": -1},
        {"layer_types": ["full_attention"]},
        {"moe_layers_enum": "3,99"},
        {"moe_layers_enum": "3,x"},
        {"moe_top_k": 99},
        {"rope_theta": [math.nan] * 12},
        {"partial_rotary_factors": [2.0] * 12},
        {"swiglu_limits": [-1.0] * 12},
        {"eos_token_id": [10**9]},
        {"num_attention_groups": 3},
        {"vocab_size": None},
        {"rms_norm_eps": math.inf},
        {"moe_router_scaling_factor": math.inf},
        {"sliding_window": 10**30},
        {"max_position_embeddings": 2**31},
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 2.0,
                "original_max_position_embeddings": 64,
                "low_freq_factor": 1.0,
                "high_freq_factor": 1.0,
            }
        },
    ],
)
def test_nonsense_is_one_sentence(change: dict[str, Any]) -> None:
    with pytest.raises(CorruptInputError) as caught:
        Step35Config.parse(raw_config() | change)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "[" * 100_000, '{"model_type": "step3p5"}'])
def test_hostile_json(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises((CorruptInputError, UnsupportedError)):
        Step35Config.load(tmp_path)


def test_a_directory_in_the_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CorruptInputError, match="cannot be read"):
        Step35Config.load(tmp_path)


def test_a_written_config_reads_back(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published()))
    assert Step35Config.load(tmp_path) == Step35Config.parse(published())
