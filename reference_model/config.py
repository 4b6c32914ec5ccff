"""The only reader of ``config.json``: what a Qwen3.5-MoE checkpoint says of its own shape.

Field names are those of the file. ``ModelConfig.from_dict`` takes the nested form of a vision-language
checkpoint (``model_type: qwen3_5_moe`` with ``text_config`` and ``vision_config``) and the flat form of a
text-only one (``qwen3_5_moe_text``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from reference_model.config_fields import (
    MOST_LAYERS,
    ConfigError,
    count,
    flag,
    mapping,
    number,
    positive,
    size,
    token_id,
    token_ids,
)
from reference_model.config_fold import original_counts
from reference_model.config_rope import RopeParameters, rope_fields_outside, whole_rope_block

LayerType = Literal["linear_attention", "full_attention"]

VISION_LANGUAGE_TYPE = "qwen3_5_moe"
TEXT_TYPE = "qwen3_5_moe_text"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """The decoder: sizes, layer pattern, experts, rotary embedding.

    ``layer_types`` has one entry a layer. ``mtp_num_hidden_layers`` counts the layers of the multi-token
    prediction head, zero when there is none. ``folded_experts`` counts the experts behind the ``num_experts`` routed
    ones that hold the shared expert's units, zero when it is stored by itself.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    layer_types: tuple[LayerType, ...]
    rope: RopeParameters = field(default_factory=RopeParameters)
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 262_144
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    router_aux_loss_coef: float = 0.001
    initializer_range: float = 0.02
    mtp_num_hidden_layers: int = 0
    eos_token_ids: tuple[int, ...] = ()
    folded_experts: int = 0

    @property
    def stored_experts(self) -> int:
        """Experts of a layer: routed ones, then those that hold the shared expert."""
        return self.num_experts + self.folded_experts

    @property
    def key_dim(self) -> int:
        """Width of all DeltaNet keys: Hk * dk."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_dim(self) -> int:
        """Width of all DeltaNet values: Hv * dv."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: queries, keys and values side by side."""
        return 2 * self.key_dim + self.value_dim

    @property
    def query_dim(self) -> int:
        """Width of all attention queries: heads * head_dim."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_dim(self) -> int:
        """Width of all attention keys, and of all values."""
        return self.num_key_value_heads * self.head_dim

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of a head that are rotated."""
        return int(self.head_dim * self.rope.partial_rotary_factor)

    @classmethod
    def from_dict(cls, block: Mapping[str, Any], *, folded_experts: int = 0) -> TextConfig:
        """Read a ``text_config`` block, or a flat text-only ``config.json``, with the original counts of experts.

        Raises:
            ConfigError: a field is missing, of the wrong type, or contradicts another.
        """
        rope = block.get("rope_parameters")
        _refuse_rope_scaling(block, block)
        outside = rope_fields_outside(block)
        if not isinstance(rope, Mapping):
            raise ConfigError(f"text config has no 'rope_parameters' block. {whole_rope_block(outside)}")
        sizes = {name: size(block, name) for name in _TEXT_SIZES}
        size(block, "num_hidden_layers", most=MOST_LAYERS)
        act = block.get("hidden_act", "silu")
        if act != "silu":
            raise ConfigError(f"hidden_act is {act!r}; this architecture uses 'silu'")
        if block.get("attn_output_gate", True) is not True:
            raise ConfigError("attn_output_gate is false; q_proj of this architecture holds a gate for every query")
        if block.get("mlp_only_layers"):
            raise ConfigError(f"mlp_only_layers is {block['mlp_only_layers']}; dense layers are not supported")
        if block.get("mtp_use_dedicated_embeddings", False):
            raise ConfigError("mtp_use_dedicated_embeddings is true; only a shared embedding is known")
        config = cls(
            **sizes,
            layer_types=layer_types_of(block, sizes["num_hidden_layers"]),
            rope=RopeParameters.from_dict(rope, outside),
            rms_norm_eps=positive(block, "rms_norm_eps", 1e-6),
            max_position_embeddings=count(block, "max_position_embeddings", 262_144),
            tie_word_embeddings=flag(block, "tie_word_embeddings", False),
            attention_bias=flag(block, "attention_bias", False),
            router_aux_loss_coef=number(block, "router_aux_loss_coef", 0.001),
            initializer_range=number(block, "initializer_range", 0.02),
            mtp_num_hidden_layers=count(block, "mtp_num_hidden_layers", 0, MOST_LAYERS),
            eos_token_ids=token_ids(block, "eos_token_id"),
            folded_experts=folded_experts,
        )
        config._check()
        return config

    def _check(self) -> None:
        for whole, part in (
            ("num_attention_heads", "num_key_value_heads"),
            ("linear_num_value_heads", "linear_num_key_heads"),
        ):
            if getattr(self, whole) % getattr(self, part):
                raise ConfigError(f"{whole} {getattr(self, whole)} is no multiple of {part} {getattr(self, part)}")
        if self.num_experts_per_tok > self.num_experts:
            raise ConfigError(f"num_experts_per_tok {self.num_experts_per_tok} exceeds num_experts {self.num_experts}")
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim or self.rotary_dim < 2:
            raise ConfigError(f"partial_rotary_factor gives {self.rotary_dim} of {self.head_dim} rotary dimensions")
        if sum(self.rope.mrope_section) != self.rotary_dim // 2:
            raise ConfigError(
                f"mrope_section {list(self.rope.mrope_section)} does not sum to {self.rotary_dim // 2}, "
                f"half of the {self.rotary_dim} rotary dimensions"
            )
        if self.attention_bias:
            raise ConfigError("attention_bias is true; checkpoints of this architecture have no attention biases")


_TEXT_SIZES = tuple(f.name for f in fields(TextConfig) if f.default is MISSING and f.type == "int")


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """The vision tower. ``out_hidden_size`` is the decoder's hidden size."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    num_position_embeddings: int
    patch_size: int = 16
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    in_channels: int = 3
    rope_theta: float = 10_000.0

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def merged_size(self) -> int:
        """Width of one token before the merger: hidden_size * spatial_merge_size ** 2."""
        return self.hidden_size * self.spatial_merge_size**2

    @classmethod
    def from_dict(cls, block: Mapping[str, Any]) -> VisionConfig:
        """Read a ``vision_config`` block.

        Raises:
            ConfigError: a field is missing or contradicts another, or deepstack layers are asked for.
        """
        if block.get("deepstack_visual_indexes"):
            raise ConfigError("vision_config.deepstack_visual_indexes is set; this architecture has no deepstack")
        names = ("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size", "num_position_embeddings")
        optional = {"patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}
        rope = mapping(block, "rope_parameters", "vision_config.")
        size(block, "depth", "vision_config.", MOST_LAYERS)
        config = cls(
            **{name: size(block, name, "vision_config.") for name in names},
            **{name: size({name: default, **block}, name, "vision_config.") for name, default in optional.items()},
            rope_theta=positive(rope, "rope_theta", 10_000.0, "vision_config.rope_parameters."),
        )
        if config.hidden_size % config.num_heads or config.head_dim % 4:
            raise ConfigError(
                f"vision_config.hidden_size {config.hidden_size} does not give {config.num_heads} heads "
                "of a width that is a multiple of 4"
            )
        if math.isqrt(config.num_position_embeddings) ** 2 != config.num_position_embeddings:
            raise ConfigError(f"vision_config.num_position_embeddings {config.num_position_embeddings} is no square")
        kinds = block.get("hidden_act", "gelu_pytorch_tanh"), rope.get("rope_type", "axial")
        if kinds != ("gelu_pytorch_tanh", "axial"):
            raise ConfigError(f"vision_config.hidden_act, rope_type are {kinds}; expected gelu_pytorch_tanh, axial")
        return config


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A whole checkpoint: the decoder, the vision tower when there is one, and its special token ids."""

    text: TextConfig
    vision: VisionConfig | None = None
    image_token_id: int | None = None
    video_token_id: int | None = None
    vision_start_token_id: int | None = None
    vision_end_token_id: int | None = None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read a parsed ``config.json``.

        Raises:
            ConfigError: another ``model_type`` (the message names it), or a field that is missing or wrong.
        """
        model_type = config.get("model_type")
        if model_type == TEXT_TYPE:
            return cls(text=_text(config, config))
        if model_type != VISION_LANGUAGE_TYPE:
            raise ConfigError(
                f"model_type is {model_type!r}; only {VISION_LANGUAGE_TYPE!r} (Qwen3.5-MoE, Qwen3.6-MoE) and "
                f"{TEXT_TYPE!r} are supported{_HINTS.get(str(model_type), '')}"
            )
        text = config.get("text_config")
        if not isinstance(text, Mapping):
            raise ConfigError("config has no 'text_config' block")
        _refuse_rope_scaling(config, text)
        if config.get("rope_parameters") is not None:
            raise ConfigError(
                "config has 'rope_parameters' beside 'text_config', where the decoder does not look. "
                + whole_rope_block(rope_fields_outside(text), text.get("rope_parameters"), config["rope_parameters"])
            )
        if "tie_word_embeddings" in config:
            text = {**text, "tie_word_embeddings": config["tie_word_embeddings"]}
        vision = mapping(config, "vision_config")
        result = cls(
            text=_text(config, text),
            vision=VisionConfig.from_dict(vision) if vision else None,
            **{name: token_id(config, name) for name in _TOKEN_IDS},
        )
        if result.vision and result.vision.out_hidden_size != result.text.hidden_size:
            raise ConfigError(
                f"vision_config.out_hidden_size {result.vision.out_hidden_size} differs from "
                f"text_config.hidden_size {result.text.hidden_size}"
            )
        return result

    @classmethod
    def from_file(cls, path: Path) -> ModelConfig:
        """Read ``config.json`` at ``path``.

        Raises:
            ConfigError: the file is missing, not JSON, or not this architecture.
        """
        try:
            parsed = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from error
        if not isinstance(parsed, dict):
            raise ConfigError(f"{path} holds no JSON object")
        try:
            return cls.from_dict(parsed)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None


def _text(config: Mapping[str, Any], block: Mapping[str, Any]) -> TextConfig:
    fields_of_decoder, folded = original_counts(config, block)
    return TextConfig.from_dict(fields_of_decoder, folded_experts=folded)


_TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")

_HINTS = {
    "qwen3_5": " (this is the dense Qwen3.5: it has no experts)",
    "qwen3_5_text": " (this is the dense Qwen3.5: it has no experts)",
    "qwen3_next": " (Qwen3-Next stores its DeltaNet projections in another layout)",
    "qwen3_moe": " (Qwen3-MoE has no DeltaNet layers)",
}


def _refuse_rope_scaling(block: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` with the block that says what ``rope_parameters`` and ``rope_scaling`` mean together."""
    scaling = block.get("rope_scaling")
    if scaling is not None:
        raise ConfigError(
            "config has 'rope_scaling': beside rope_parameters it makes engines drop rope_theta and mrope_section "
            "silently. Remove it and name everything in one block. "
            + whole_rope_block(rope_fields_outside(text), text.get("rope_parameters"), scaling)
        )


def layer_types_of(block: Mapping[str, Any], count: int) -> tuple[LayerType, ...]:
    """``layer_types`` when given, else every ``full_attention_interval``-th layer (default 4) is full attention."""
    given = block.get("layer_types")
    if given is None:
        interval = size({"full_attention_interval": 4, **block}, "full_attention_interval")
        return tuple("linear_attention" if (i + 1) % interval else "full_attention" for i in range(count))
    if not isinstance(given, (list, tuple)):
        raise ConfigError(f"layer_types is {given!r}; expected a list")
    unknown = [t for t in given if t not in ("linear_attention", "full_attention")]
    if unknown:
        raise ConfigError(f"layer_types has an unknown entry {unknown[0]!r}")
    if len(given) != count:
        raise ConfigError(f"layer_types has {len(given)} entries for {count} layers")
    return tuple(given)
