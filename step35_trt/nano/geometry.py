"""nano's `config.json`: the published format, every feature of the large model, a small geometry."""

from __future__ import annotations

from typing import Any

from step35_trt.nano import vocabulary

LAYERS, MODULES = 9, 3
HIDDEN, HEAD_DIM, GROUPS = 128, 16, 2
WINDOW = 64
CLAMPED = {LAYERS - 2: 7.0, LAYERS - 1: 7.0}  # layers 43 and 44 of the large model
CLAMPED_SHARED = {LAYERS - 1: 16.0}


def raw_config(end_ids: list[int]) -> dict[str, Any]:
    """What `config.json` says; lists have an entry for each layer and then one for each MTP module."""
    total = LAYERS + MODULES
    full = [i % 4 == 0 for i in range(total)]
    return {
        "architectures": ["Step3p5ForCausalLM"],
        "model_type": "step3p5",
        "torch_dtype": "bfloat16",
        "vocab_size": vocabulary.VOCABULARY_SIZE,
        "hidden_size": HIDDEN,
        "intermediate_size": 256,
        "num_hidden_layers": LAYERS,
        "num_nextn_predict_layers": MODULES,
        "num_attention_heads": 16,
        "num_attention_groups": GROUPS,
        "head_dim": HEAD_DIM,
        "max_seq_len": vocabulary.MODEL_MAX_LENGTH,
        "max_position_embeddings": vocabulary.MODEL_MAX_LENGTH,
        "use_qk_norm": True,
        "zero_centered": True,
        "att_impl_type": "GQA",
        "attention_other_setting": {
            "attention_type": "sliding_attention",
            "num_attention_heads": 24,
            "num_attention_groups": GROUPS,
            "head_dim": HEAD_DIM,
            "true_head_dim": HEAD_DIM,
        },
        "use_head_wise_attn_gate": True,
        "sink": False,
        "layer_types": ["full_attention" if f else "sliding_attention" for f in full],
        "sliding_window": WINDOW,
        "rope_theta": [5e6 if f else 1e4 for f in full],
        "partial_rotary_factors": [0.5 if f else 1.0 for f in full],
        "use_rope_layers": [],
        # With 1024, the four frequencies of a full layer's head reach all three branches of the scaling.
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
        "moe_layers_enum": ",".join(str(i) for i in range(3, LAYERS)),
        "moe_num_experts": 12,
        "moe_top_k": 4,
        "moe_intermediate_size": 64,
        "share_expert_dim": 64,
        "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": 3.0,
        "use_moe_router_bias": True,
        "norm_expert_weight": True,
        "need_fp32_gate": True,
        "swiglu_limits": [CLAMPED.get(i, 0.0) for i in range(total)],
        "swiglu_limits_shared": [CLAMPED_SHARED.get(i, 0.0) for i in range(total)],
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": end_ids,
    }
