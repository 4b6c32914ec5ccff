"""The frozen description of the demo checkpoint: ``config.json`` and the configs that come with it."""

from __future__ import annotations

from typing import Any

from calibration.tokenizer import SPECIAL_TOKENS

VOCAB_SIZE = 2048
CONTEXT = 4096
TOKEN_IDS = {token: VOCAB_SIZE - len(SPECIAL_TOKENS) + i for i, token in enumerate(SPECIAL_TOKENS)}

TEXT_CONFIG: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_output_gate": True,
    "dtype": "bfloat16",
    "eos_token_id": TOKEN_IDS["<|endoftext|>"],
    "full_attention_interval": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 384,
    "initializer_range": 0.02,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 8,
    "linear_value_head_dim": 64,
    "mamba_ssm_dtype": "float32",
    "max_position_embeddings": CONTEXT,
    "mlp_only_layers": [],
    "model_type": "qwen3_5_moe_text",
    "moe_intermediate_size": 128,
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "num_attention_heads": 9,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [3, 3, 2],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "rope_type": "default",
    },
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 256,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
}

VISION_CONFIG: dict[str, Any] = {
    "deepstack_visual_indexes": [],
    "depth": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 80,
    "in_channels": 3,
    "initializer_range": 0.02,
    "intermediate_size": 144,
    "model_type": "qwen3_5_moe",
    "num_heads": 5,
    "num_position_embeddings": 64,
    "out_hidden_size": 384,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "dtype": "bfloat16",
    "image_token_id": TOKEN_IDS["<|image_pad|>"],
    "model_type": "qwen3_5_moe",
    "text_config": TEXT_CONFIG,
    "tie_word_embeddings": False,
    "video_token_id": TOKEN_IDS["<|video_pad|>"],
    "vision_config": VISION_CONFIG,
    "vision_end_token_id": TOKEN_IDS["<|vision_end|>"],
    "vision_start_token_id": TOKEN_IDS["<|vision_start|>"],
}

GENERATION_CONFIG: dict[str, Any] = {
    "bos_token_id": TOKEN_IDS["<|endoftext|>"],
    "do_sample": True,
    "eos_token_id": [TOKEN_IDS["<|im_end|>"], TOKEN_IDS["<|endoftext|>"]],
    "pad_token_id": TOKEN_IDS["<|endoftext|>"],
    "temperature": 1.0,
    "top_k": 20,
    "top_p": 0.95,
}

_PATCHES = {
    "patch_size": VISION_CONFIG["patch_size"],
    "temporal_patch_size": VISION_CONFIG["temporal_patch_size"],
    "merge_size": VISION_CONFIG["spatial_merge_size"],
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}

IMAGE_PROCESSOR: dict[str, Any] = {
    "size": {"longest_edge": 512 * 512, "shortest_edge": 64 * 64},
    **_PATCHES,
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "processor_class": "Qwen3VLProcessor",
}

VIDEO_PROCESSOR: dict[str, Any] = {
    "size": {"longest_edge": 16 * 256 * 256, "shortest_edge": 64 * 64},
    **_PATCHES,
    "processor_class": "Qwen3VLProcessor",
    "video_processor_type": "Qwen3VLVideoProcessor",
}

FILES: dict[str, dict[str, Any]] = {
    "config.json": CONFIG,
    "generation_config.json": GENERATION_CONFIG,
    "preprocessor_config.json": IMAGE_PROCESSOR,
    "video_preprocessor_config.json": VIDEO_PROCESSOR,
}
"""JSON files of the checkpoint folder that do not depend on training."""
