"""The model's facts, layer by layer, read from `config.json` (specification sections 1 and 3)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from step35_trt.errors import CorruptInputError, UnsupportedError
from step35_trt.quantize.declared import QuantizationConfig

if TYPE_CHECKING:
    from pathlib import Path

AttentionKind = Literal["full_attention", "sliding_attention"]
Size = Annotated[int, Field(gt=0, lt=2**31)]  # graphs and kernels count with 32 bits

# Keys that describe the file, the framework or training, and cannot change a forward pass.
INERT_KEYS = frozenset(
    "architectures model_type auto_map torch_dtype dtype transformers_version _name_or_path use_cache "
    "pad_token_id max_seq_len initializer_range output_attentions output_hidden_states return_dict "
    "attention_dropout tokenizer_class id2label label2id num_experts_per_tok num_experts num_local_experts "
    "image_token_id image_token_len patch_token_len understand_projector_stride vision_config "
    "vision_select_layer projector_bias chunk_size_feed_forward is_encoder_decoder problem_type".split()
)


class RopeScaling(BaseModel):
    """Llama-3 frequency scaling (specification 2.4); the original context is in tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    rope_type: Literal["llama3"]
    factor: float = Field(gt=0)
    original_max_position_embeddings: Size
    low_freq_factor: float = Field(gt=0)
    high_freq_factor: float = Field(gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> RopeScaling:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor is not above low_freq_factor")
        return self


class SlidingAttention(BaseModel):
    """`attention_other_setting`: the geometry of the window layers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    attention_type: Literal["sliding_attention"]
    num_attention_heads: Size
    num_attention_groups: Size
    head_dim: Size
    true_head_dim: int | None = None


@dataclass(frozen=True)
class LayerSpec:
    """Everything that is particular to one layer.

    `window` counts keys including the query's own (0: no window). Limits are the clamps of
    specification 2.7, 0 where the layer has none. `rotary_dims` leading dimensions of a head turn.
    """

    index: int
    kind: AttentionKind
    query_heads: int
    kv_heads: int
    head_dim: int
    window: int
    rope_theta: float
    rotary_dims: int
    rope_scaling: RopeScaling | None
    moe: bool
    routed_limit: float
    shared_limit: float

    @property
    def prefix(self) -> str:
        """Where the checkpoint keeps this layer."""
        return f"model.layers.{self.index}"


class Step35Config(BaseModel):
    """`config.json` of Step 3.5 Flash, validated; see `layers` for what each layer is.

    Raises:
        UnsupportedError: from `load` and `parse`, naming a setting this compiler does not implement.
        CorruptInputError: from `load` and `parse`, when values are missing or out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: int = Field(gt=0, le=1024)
    num_nextn_predict_layers: int = Field(default=0, ge=0, le=8)
    num_attention_heads: Size
    num_attention_groups: Size
    head_dim: Size
    max_position_embeddings: Size = 262144
    rms_norm_eps: float = Field(default=1e-5, gt=0)  # absent from the published 3.5 config (spec 1.1)
    attention_other_setting: SlidingAttention
    layer_types: tuple[AttentionKind, ...]
    sliding_window: Size
    rope_theta: tuple[float, ...]
    partial_rotary_factors: tuple[float, ...]
    rope_scaling: RopeScaling | None = None
    yarn_only_types: tuple[AttentionKind, ...] = ()
    use_rope_layers: tuple[()] = ()
    moe_layers_enum: tuple[int, ...]
    moe_num_experts: Size
    moe_top_k: Size
    moe_intermediate_size: Size
    share_expert_dim: Size
    moe_router_scaling_factor: float = Field(gt=0)
    swiglu_limits: tuple[float, ...]
    swiglu_limits_shared: tuple[float, ...]
    bos_token_id: int = 0
    eos_token_id: tuple[int, ...] = ()
    quantization_config: QuantizationConfig | None = None

    # Switches with one implemented value. Another value is another model: refused by name.
    use_qk_norm: Literal[True] = True
    zero_centered: Literal[True] = True
    use_head_wise_attn_gate: Literal[True]
    use_moe: Literal[True]
    use_moe_router_bias: Literal[True]
    norm_expert_weight: Literal[True]
    need_fp32_gate: Literal[True]
    moe_router_activation: Literal["sigmoid"]
    moe_every_n_layer: Literal[1] = 1
    moe_layer_offset: Literal[0] = 0
    att_impl_type: Literal["GQA"] = "GQA"
    sink: Literal[False] = False
    tie_word_embeddings: Literal[False] = False
    attention_bias: Literal[False] = False
    hidden_act: Literal["silu"] = "silu"

    @field_validator("moe_layers_enum", mode="before")
    @classmethod
    def _layer_numbers(cls, value: Any) -> Any:
        return (
            tuple(int(part) for part in value.split(",") if part.strip()) if isinstance(value, str) else value
        )

    @field_validator("eos_token_id", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int) else value

    @field_validator("swiglu_limits", "swiglu_limits_shared", mode="before")
    @classmethod
    def _absent_limits(cls, value: Any) -> Any:
        return tuple(0.0 if item is None else item for item in value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _consistent(self) -> Step35Config:
        count = self.num_hidden_layers + self.num_nextn_predict_layers
        lists = (
            "layer_types",
            "rope_theta",
            "partial_rotary_factors",
            "swiglu_limits",
            "swiglu_limits_shared",
        )
        for name in lists:
            if len(getattr(self, name)) != count:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries for {self.num_hidden_layers} layers "
                    f"and {self.num_nextn_predict_layers} MTP modules"
                )
        for heads, groups in (
            (self.num_attention_heads, self.num_attention_groups),
            (
                self.attention_other_setting.num_attention_heads,
                self.attention_other_setting.num_attention_groups,
            ),
        ):
            if heads % groups:
                raise ValueError(f"{heads} query heads are not a multiple of {groups} KV heads")
        if any(not 0 <= i < self.num_hidden_layers for i in self.moe_layers_enum):
            raise ValueError("moe_layers_enum names a layer that does not exist")
        if self.moe_top_k > self.moe_num_experts:
            raise ValueError(f"moe_top_k {self.moe_top_k} exceeds {self.moe_num_experts} experts")
        if any(x < 0 for x in (*self.swiglu_limits, *self.swiglu_limits_shared)):
            raise ValueError("a swiglu limit is negative")
        if any(not 0 < x <= 1 for x in self.partial_rotary_factors):
            raise ValueError("a partial rotary factor lies outside (0, 1]")
        if any(x <= 1 for x in self.rope_theta):
            raise ValueError("a rope_theta is not a number above 1")
        if any(not 0 <= i < self.vocab_size for i in (self.bos_token_id, *self.eos_token_id)):
            raise ValueError("bos_token_id or eos_token_id lies outside the vocabulary")
        return self

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The decoder's layers in order."""
        return tuple(self._layer(i) for i in range(self.num_hidden_layers))

    @property
    def mtp_layers(self) -> tuple[LayerSpec, ...]:
        """The layer of each MTP module in order; their indices follow the decoder's."""
        first = self.num_hidden_layers
        return tuple(self._layer(first + k) for k in range(self.num_nextn_predict_layers))

    def _layer(self, index: int) -> LayerSpec:
        kind = self.layer_types[index]
        sliding = kind == "sliding_attention"
        shape = self.attention_other_setting if sliding else self
        return LayerSpec(
            index=index,
            kind=kind,
            query_heads=shape.num_attention_heads,
            kv_heads=shape.num_attention_groups,
            head_dim=shape.head_dim,
            window=self.sliding_window if sliding else 0,
            rope_theta=self.rope_theta[index],
            rotary_dims=int(shape.head_dim * self.partial_rotary_factors[index]) // 2 * 2,
            rope_scaling=self.rope_scaling if kind in self.yarn_only_types else None,
            moe=index in self.moe_layers_enum,
            routed_limit=self.swiglu_limits[index],
            shared_limit=self.swiglu_limits_shared[index],
        )

    def same_model(self, other: Step35Config) -> bool:
        """Whether both describe one model, however its weights are stored."""
        plain = {"quantization_config": None}
        return self.model_copy(update=plain) == other.model_copy(update=plain)

    @classmethod
    def load(cls, directory: Path) -> Step35Config:
        """Read `config.json` in a checkpoint directory, or the file itself."""
        path = directory if directory.is_file() else directory / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CorruptInputError(
                f"{directory} has no config.json",
                "Point at the directory of a Hugging Face checkpoint, or use 'nano'.",
            ) from None
        except OSError as error:
            raise CorruptInputError(f"{path} cannot be read: {error.strerror or error}") from None
        except (ValueError, RecursionError) as error:
            raise CorruptInputError(f"{path} is not valid JSON: {error}") from None
        return cls.parse(raw)

    @classmethod
    def parse(cls, raw: object) -> Step35Config:
        """Validate a decoded `config.json`; Step 3.7's nested `text_config` is accepted."""
        if not isinstance(raw, dict):
            raise CorruptInputError("config.json does not hold an object")
        if isinstance(text := raw.get("text_config"), dict):
            # Only what concerns the text decoder may be lifted from the outer level.
            outer = {
                k: raw[k] for k in ("quantization_config", "tie_word_embeddings") if raw.get(k) is not None
            }
            raw = {**outer, **text}
        if raw.get("model_type") not in ("step3p5", "step3p5_text", "step3p7_text"):
            raise UnsupportedError(
                f"model_type {raw.get('model_type')!r} is not Step 3.5 Flash",
                "This compiler takes checkpoints whose config.json says model_type step3p5.",
            )
        known = {k: v for k, v in raw.items() if k not in INERT_KEYS}
        if "share_expert_dims" in known:
            known["share_expert_dim"] = known.pop("share_expert_dims")
        for key in sorted(known.keys() - cls.model_fields.keys()):
            if known.pop(key):  # something switched off is no feature
                raise UnsupportedError(f"config.json sets {key}, which this compiler does not know")
        values = {k: v for k, v in known.items() if v is not None}
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _explain(error) from None


def _explain(error: ValidationError) -> UnsupportedError | CorruptInputError:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("literal_error", "extra_forbidden", "union_tag_invalid") or where.startswith(
        "use_rope_layers"
    ):
        return UnsupportedError(
            f"config.json sets {where} to {first['input']!r}, which is not supported ({message})"
        )
    return CorruptInputError(f"config.json: {where + ': ' if where else ''}{message}")
