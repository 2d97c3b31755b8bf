"""The independent reference: transformers' Step3p7TextModel, and its layers put together as MTP modules.

Specification section 9. The package has no MTP of this kind, so the modules are assembled from its own
decoder layer, norm and rotary classes by the recipe of section 9.2.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import Step3p7TextConfig
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.step3p7.modeling_step3p7 import (
    Step3p7DecoderLayer,
    Step3p7RMSNorm,
    Step3p7RotaryEmbedding,
    Step3p7TextModel,
)

from step35_trt.checkpoint import Checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np


@dataclass(frozen=True)
class Oracle:
    """fp32 logits and hidden states of a checkpoint for whole prompts, without any cache."""

    checkpoint: Checkpoint
    main: Any
    modules: tuple[dict[str, Any], ...]

    @classmethod
    def load(cls, directory: Path) -> Oracle:
        raw = json.loads((directory / "config.json").read_text())
        checkpoint = Checkpoint.open(directory)
        config = Step3p7TextConfig(**raw)
        config._attn_implementation = "eager"
        main = Step3p7TextModel(config).eval()
        main.load_state_dict(_main_state(checkpoint), strict=False, assign=True)
        modules = tuple(_module(checkpoint, raw, k) for k in range(raw["num_nextn_predict_layers"]))
        return cls(checkpoint, main, modules)

    def decode(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits `[T, V]` and the hidden state `[T, D]` before the final norm."""
        seen = {}
        hook = self.main.layers[-1].register_forward_hook(
            lambda _m, _i, out: seen.__setitem__("hidden", out[0] if isinstance(out, tuple) else out)
        )
        with torch.inference_mode():
            normed = self.main(torch.from_numpy(ids)[None]).last_hidden_state[0]
            logits = normed @ torch.from_numpy(self.checkpoint.read("lm_head.weight")).T
        hook.remove()
        return logits.numpy(), seen["hidden"].reshape(len(ids), -1).numpy()

    def draft(self, module: int, ids: np.ndarray, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits and hidden of a module whose row p is given token p + 1 + module and row p of `hidden`."""
        parts = self.modules[module]
        with torch.inference_mode():
            e = parts["enorm"](parts["embedding"][torch.from_numpy(ids)])[None]
            h = parts["hnorm"](torch.from_numpy(hidden))[None]
            x = torch.cat([e, h], -1) @ parts["eh_proj"].T
            positions = torch.arange(len(ids))[None]
            mask = create_sliding_window_causal_mask(
                config=parts["config"],
                inputs_embeds=x,
                attention_mask=None,
                past_key_values=None,
                position_ids=positions,
            )
            rope = parts["rotary"](x, positions, "sliding_attention")
            out = parts["block"](x, attention_mask=mask, position_embeddings=rope, position_ids=positions)
            out = (out[0] if isinstance(out, tuple) else out).reshape(len(ids), -1)
            return (parts["norm"](out) @ parts["output"].T).numpy(), out.numpy()


def _tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    return torch.from_numpy(checkpoint.read(name))


def _block_state(checkpoint: Checkpoint, prefix: str) -> dict[str, torch.Tensor]:
    state = {}
    for name in checkpoint.tensors:
        if not name.startswith(prefix + "."):
            continue
        local = name[len(prefix) + 1 :]
        if local.startswith(("enorm", "hnorm", "eh_proj", "transformer")) or local.endswith("scale_inv"):
            continue
        local = local.replace("moe.router_bias", "mlp.gate.e_score_correction_bias")
        local = local.replace("moe.gate.weight", "mlp.gate.weight").replace(
            "share_expert", "mlp.shared_experts"
        )
        if local == "moe.gate_proj.weight":
            up = _tensor(checkpoint, f"{prefix}.moe.up_proj.weight")
            state["mlp.experts.gate_up_proj"] = torch.cat([_tensor(checkpoint, name), up], 1)
        elif local == "moe.down_proj.weight":
            state["mlp.experts.down_proj"] = _tensor(checkpoint, name)
        elif local != "moe.up_proj.weight":
            state[local] = _tensor(checkpoint, name)
    return state


def _main_state(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    state = {
        "embed_tokens.weight": _tensor(checkpoint, "model.embed_tokens.weight"),
        "norm.weight": _tensor(checkpoint, "model.norm.weight"),
    }
    for layer in checkpoint.config.layers:
        for name, value in _block_state(checkpoint, layer.prefix).items():
            state[f"layers.{layer.index}.{name}"] = value
    return state


def _module(checkpoint: Checkpoint, raw: dict[str, Any], k: int) -> dict[str, Any]:
    other = raw["attention_other_setting"]
    count = raw["num_nextn_predict_layers"]
    config = Step3p7TextConfig(
        vocab_size=raw["vocab_size"], hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"], num_hidden_layers=count,
        num_attention_heads=other["num_attention_heads"], num_attention_groups=other["num_attention_groups"],
        head_dim=other["head_dim"], max_position_embeddings=raw["max_position_embeddings"],
        rms_norm_eps=1e-5, layer_types=["sliding_attention"] * count, mlp_layer_types=["dense"] * count,
        sliding_window=raw["sliding_window"], rope_theta=1e4, swiglu_limits=None, swiglu_limits_shared=None,
        use_head_wise_attn_gate=True,
    )  # fmt: skip
    config._attn_implementation = "eager"
    prefix = checkpoint.config.mtp_layers[k].prefix
    block = Step3p7DecoderLayer(config, k).eval()
    missing, unexpected = block.load_state_dict(_block_state(checkpoint, prefix), strict=False, assign=True)
    assert not missing, missing
    assert not unexpected, unexpected
    norms = {}
    for name, where in (("enorm", "enorm"), ("hnorm", "hnorm"), ("norm", "transformer.shared_head.norm")):
        norms[name] = Step3p7RMSNorm(raw["hidden_size"], eps=1e-5)
        norms[name].weight.data = _tensor(checkpoint, f"{prefix}.{where}.weight")
    return norms | {
        "config": config,
        "block": block,
        "rotary": Step3p7RotaryEmbedding(config),
        "embedding": _tensor(checkpoint, "model.embed_tokens.weight"),
        "eh_proj": _tensor(checkpoint, f"{prefix}.eh_proj.weight"),
        "output": _tensor(checkpoint, f"{prefix}.transformer.shared_head.output.weight"),
    }
