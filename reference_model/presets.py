"""Sizes of the public checkpoints."""

from __future__ import annotations

from reference_model.config import ModelConfig, TextConfig, VisionConfig, layer_types_of


def _public_text(
    hidden: int, layers: int, heads: int, value_heads: int, experts: int, top_k: int, width: int
) -> TextConfig:
    return TextConfig(
        vocab_size=248_320,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=value_heads,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=width,
        shared_expert_intermediate_size=width,
        layer_types=layer_types_of({}, layers),
        mtp_num_hidden_layers=1,
        eos_token_ids=(248_044,),
    )


def _public(text: TextConfig) -> ModelConfig:
    vision = VisionConfig(
        depth=27,
        hidden_size=1152,
        intermediate_size=4304,
        num_heads=16,
        out_hidden_size=text.hidden_size,
        num_position_embeddings=2304,
    )
    return ModelConfig(
        text=text,
        vision=vision,
        image_token_id=248_056,
        video_token_id=248_057,
        vision_start_token_id=248_053,
        vision_end_token_id=248_054,
    )


PRESETS: dict[str, ModelConfig] = {
    "35b-a3b": _public(_public_text(2048, 40, 16, 32, 256, 8, 512)),
    "122b-a10b": _public(_public_text(3072, 48, 32, 64, 256, 8, 1024)),
    "397b-a17b": _public(_public_text(4096, 60, 32, 64, 512, 10, 1024)),
}
"""Sizes of the public checkpoints; Qwen3.6-35B-A3B has those of 35B-A3B."""
