"""Step 3.5 Flash, written once (specification sections 2 and 3). Names are the checkpoint's."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from step35_trt.config import LayerSpec, Step35Config
    from step35_trt.ops import Ops, T, V


def decoder(ops: Ops[T, V], config: Step35Config, token_ids: T, rows: T) -> tuple[T, T]:
    """The main stack.

    Args:
        ops: A dialect.
        config: The model.
        token_ids: `[t]`.
        rows: `[r]` indices of the tokens whose logits are wanted.

    Returns:
        Logits `[r, vocabulary]` and the hidden state `[t, D]` before the final norm, which is what the
        first MTP module takes (specification 3.2).
    """
    x = ops.embedding(token_ids, "model.embed_tokens.weight")
    for layer in config.layers:
        x = block(ops, config, layer, x)
    return head(ops, config, ops.rows(x, rows), "model.norm.weight", "lm_head.weight"), x


def mtp_module(
    ops: Ops[T, V], config: Step35Config, module: int, token_ids: T, hidden: T, rows: T
) -> tuple[T, T]:
    """One multi-token-prediction module.

    Row p takes token p+1+module and the hidden state of row p: the decoder's for module 0, the previous
    module's for the others.

    Args:
        ops: A dialect.
        config: The model.
        module: Which module, from 0.
        token_ids: `[t]`.
        hidden: `[t, D]`.
        rows: `[r]` indices of the rows whose logits are wanted.

    Returns:
        Logits `[r, vocabulary]` of the module's own head and hidden `[t, D]` before its norm.
    """
    layer = config.mtp_layers[module]
    p, eps = layer.prefix, config.rms_norm_eps
    embedded = norm(ops, ops.embedding(token_ids, "model.embed_tokens.weight"), f"{p}.enorm.weight", eps)
    carried = norm(ops, hidden, f"{p}.hnorm.weight", eps)
    x = ops.linear(ops.concat(embedded, carried), f"{p}.eh_proj.weight")  # the embedding comes first
    x = block(ops, config, layer, x)
    own = f"{p}.transformer.shared_head"  # "shared" in name only: each module has its own
    return head(ops, config, ops.rows(x, rows), f"{own}.norm.weight", f"{own}.output.weight"), x


def block(ops: Ops[T, V], config: Step35Config, layer: LayerSpec, x: T) -> T:
    """Attention and feed-forward with their residuals: `[t, D]` to `[t, D]`."""
    p, eps = layer.prefix, config.rms_norm_eps
    x = ops.add(x, attention(ops, layer, norm(ops, x, f"{p}.input_layernorm.weight", eps), eps))
    normed = norm(ops, x, f"{p}.post_attention_layernorm.weight", eps)
    if not layer.moe:
        return ops.add(x, mlp(ops, f"{p}.mlp", layer.shared_limit, normed))
    routed = moe(ops, config, layer, normed)
    return ops.add(x, ops.add(routed, mlp(ops, f"{p}.share_expert", layer.shared_limit, normed)))


def attention(ops: Ops[T, V], layer: LayerSpec, x: T, eps: float) -> T:
    """Grouped-query attention; the gate's logits come from the same normed input as q, k and v."""
    p = f"{layer.prefix}.self_attn"
    out = ops.gated_attention(
        ops.linear(x, f"{p}.q_proj.weight"),
        ops.linear(x, f"{p}.k_proj.weight"),
        ops.linear(x, f"{p}.v_proj.weight"),
        ops.linear(x, f"{p}.g_proj.weight"),
        ops.plus_one(ops.vector(f"{p}.q_norm.weight")),
        ops.plus_one(ops.vector(f"{p}.k_norm.weight")),
        eps,
        layer,
    )
    return ops.linear(out, f"{p}.o_proj.weight")


def moe(ops: Ops[T, V], config: Step35Config, layer: LayerSpec, x: T) -> T:
    """Routed experts: sigmoid scores in fp32, a bias that selects but does not weigh."""
    p = f"{layer.prefix}.moe"
    scores = ops.sigmoid(ops.linear_fp32(x, f"{p}.gate.weight"))
    selection = ops.bias(scores, ops.vector(f"{p}.router_bias"))
    scale, limit = config.moe_router_scaling_factor, layer.routed_limit
    return ops.sparse_moe(x, selection, scores, p, config.moe_top_k, scale, limit)


def mlp(ops: Ops[T, V], p: str, limit: float, x: T) -> T:
    """SwiGLU feed-forward; dense layers and shared experts."""
    gate, up = ops.linear(x, f"{p}.gate_proj.weight"), ops.linear(x, f"{p}.up_proj.weight")
    return ops.linear(ops.swiglu(gate, up, limit), f"{p}.down_proj.weight")


def norm(ops: Ops[T, V], x: T, weight: str, eps: float) -> T:
    """RMSNorm with zero-centred weights."""
    return ops.rms_norm(x, ops.plus_one(ops.vector(weight)), eps)


def head(ops: Ops[T, V], config: Step35Config, x: T, norm_weight: str, weight: str) -> T:
    """Final norm and vocabulary projection: `[r, D]` to `[r, vocabulary]`."""
    return ops.linear(norm(ops, x, norm_weight, config.rms_norm_eps), weight)
