"""Random Step 3.5 checkpoints in the published layout, in geometries small enough for a test."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from step35_trt.checkpoint import expected_tensors
from step35_trt.config import Step35Config

if TYPE_CHECKING:
    from pathlib import Path


def raw_config(**changes: Any) -> dict[str, Any]:
    """A `config.json` spelled as the published one: 9 + 3 layers, clamps on the last two, window 8."""
    layers, modules = changes.pop("layers", 9), changes.pop("modules", 3)
    full_heads, window_heads = changes.pop("heads", (8, 12))
    groups, head_dim = changes.pop("groups", 1), changes.pop("head_dim", 16)
    total = layers + modules
    full = [i % 4 == 0 for i in range(total)]
    raw: dict[str, Any] = {
        "architectures": ["Step3p5ForCausalLM"],
        "model_type": "step3p5",
        "torch_dtype": "bfloat16",
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": modules,
        "num_attention_heads": full_heads,
        "num_attention_groups": groups,
        "head_dim": head_dim,
        "max_seq_len": 4096,
        "max_position_embeddings": 4096,
        "use_qk_norm": True,
        "zero_centered": True,
        "att_impl_type": "GQA",
        "attention_other_setting": {
            "attention_type": "sliding_attention",
            "num_attention_heads": window_heads,
            "num_attention_groups": groups,
            "head_dim": head_dim,
            "true_head_dim": head_dim,
        },
        "use_head_wise_attn_gate": True,
        "sink": False,
        "layer_types": ["full_attention" if f else "sliding_attention" for f in full],
        "sliding_window": 8,
        "rope_theta": [5e6 if f else 1e4 for f in full],
        "partial_rotary_factors": [0.5 if f else 1.0 for f in full],
        "use_rope_layers": [],
        # 1024 puts the frequencies of a small head into all three branches of the scaling.
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 2.0,
            "original_max_position_embeddings": 1024,
            "low_freq_factor": 1.0,
            "high_freq_factor": 32.0,
        },
        "yarn_only_types": ["full_attention"],
        "use_moe": True,
        "moe_every_n_layer": 1,
        "moe_layer_offset": 0,
        "moe_layers_enum": ",".join(str(i) for i in range(min(3, layers - 1), layers)),
        "moe_num_experts": 12,
        "moe_top_k": 3,
        "moe_intermediate_size": 32,
        "share_expert_dim": 32,
        "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": 3.0,
        "use_moe_router_bias": True,
        "norm_expert_weight": True,
        "need_fp32_gate": True,
        "swiglu_limits": [0.7 if layers - 2 <= i < layers else 0.0 for i in range(total)],
        "swiglu_limits_shared": [1.6 if i == layers - 1 else 0.0 for i in range(total)],
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": [1, 2, 5],
    }
    return raw | changes


def random_weights(config: Step35Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights lively enough that clamps are hit and the router's bias changes selections."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in expected_tensors(config).items():
        if name.endswith("router_bias"):
            weights[name] = rng.normal(0, 0.3, shape).astype(np.float32)
        else:
            spread = 0.2 if "norm" in name else 1.2 / np.sqrt(shape[-1])
            weights[name] = rng.normal(0, spread, shape).astype(ml_dtypes.bfloat16)
    return weights


def write_checkpoint(directory: Path, raw: dict[str, Any], seed: int = 0, shards: int = 3) -> Path:
    """A checkpoint as the hub has it: config, shards and their index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    weights = random_weights(Step35Config.parse(raw), seed)
    names = list(weights)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in names[shard::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return directory
