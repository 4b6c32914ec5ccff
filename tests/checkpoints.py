"""Tiny random checkpoints in every shape that people have them: two expert layouts, two namings, three types.

No two sizes that could be mistaken for each other coincide: a swapped or transposed matrix cannot fit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from reference_model.config import ModelConfig

Layout = Literal["fused", "per-expert"]
Naming = Literal["vl", "text"]

_SMALL = {
    "hidden_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 40,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 96,
    "linear_value_head_dim": 56,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 32,
}
"""Every matrix's inputs are a multiple of 32."""

_LARGE = {
    "hidden_size": 384,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "head_dim": 64,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 112,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 768,
}
"""Every matrix's inputs are a multiple of 128."""

_REAL = {
    **_LARGE,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 256,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "shared_expert_intermediate_size": 640,
}
"""Heads as wide as those of the published models; 128 divides every matrix but in_proj_a and in_proj_b both ways."""

_MROPE = {40: [2, 2, 1], 64: [3, 3, 2], 256: [11, 11, 10]}
"""Sections by the width of a head."""


def tiny_config(
    *,
    naming: Naming = "vl",
    mtp: bool = True,
    vision: bool = True,
    tie: bool = False,
    group: int = 32,
    experts: int = 6,
    layers: int = 3,
    shared: int | None = None,
    real_heads: bool = False,
) -> dict[str, Any]:
    """The ``config.json`` of a tiny checkpoint; ``group`` 32 or 128 divides every matrix's inputs.

    ``shared`` is another width of the shared expert. ``real_heads`` are those of the published models, for ``group``
    128.
    """
    sizes = _REAL if real_heads else {32: _SMALL, 128: _LARGE}[group]
    if shared is not None:
        sizes = sizes | {"shared_expert_intermediate_size": shared}
    text: dict[str, Any] = {
        "model_type": "qwen3_5_moe_text",
        "vocab_size": 416,
        "num_hidden_layers": layers,
        "num_experts": experts,
        "num_experts_per_tok": 2,
        **sizes,
        "linear_conv_kernel_dim": 4,
        "layer_types": ["full_attention" if i % 3 == 1 else "linear_attention" for i in range(layers)],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000_000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": _MROPE[sizes["head_dim"]],
            "mrope_interleaved": True,
        },
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": tie,
        "mtp_num_hidden_layers": int(mtp),
        "eos_token_id": 1,
    }
    if naming == "text":
        return {"architectures": ["Qwen3_5MoeForCausalLM"], **text}
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "text_config": text,
        "tie_word_embeddings": tie,
        "image_token_id": 410,
        "video_token_id": 411,
        "vision_start_token_id": 412,
        "vision_end_token_id": 413,
    } | ({"vision_config": _vision(sizes["hidden_size"])} if vision else {})


def _vision(out: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3_5_moe_vision",
        "depth": 1,
        "hidden_size": 20,
        "intermediate_size": 44,
        "num_heads": 5,
        "in_channels": 3,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": out,
        "num_position_embeddings": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "deepstack_visual_indexes": [],
    }


def tiny_tensors(config: Mapping[str, Any], *, layout: Layout = "fused", seed: int = 0) -> dict[str, Tensor]:
    """Random fp32 weights under the names of the hub, for a configuration of ``tiny_config``."""
    text = config.get("text_config", config)
    prefix = "model.language_model." if "text_config" in config else "model."
    gen = torch.Generator().manual_seed(seed)

    def matrix(*shape: int, gain: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=gen) * (gain / shape[-1] ** 0.5)

    def vector(size: int, centre: float = 0.0, spread: float = 0.1) -> Tensor:
        return centre + spread * torch.randn(size, generator=gen)

    d, f, s = text["hidden_size"], text["moe_intermediate_size"], text["shared_expert_intermediate_size"]
    e, hd = text["num_experts"], text["head_dim"]
    nq, nkv = text["num_attention_heads"] * hd, text["num_key_value_heads"] * hd
    hv, dv = text["linear_num_value_heads"], text["linear_value_head_dim"]
    nv, nk = hv * dv, text["linear_num_key_heads"] * text["linear_key_head_dim"]
    conv = 2 * nk + nv
    out: dict[str, Tensor] = {}

    def layer(at: str, full: bool) -> None:
        out[f"{at}.input_layernorm.weight"] = vector(d)
        if full:
            out[f"{at}.self_attn.q_proj.weight"] = matrix(2 * nq, d)
            out[f"{at}.self_attn.k_proj.weight"] = matrix(nkv, d)
            out[f"{at}.self_attn.v_proj.weight"] = matrix(nkv, d)
            out[f"{at}.self_attn.o_proj.weight"] = matrix(d, nq)
            out[f"{at}.self_attn.q_norm.weight"] = vector(hd)
            out[f"{at}.self_attn.k_norm.weight"] = vector(hd)
        else:
            out[f"{at}.linear_attn.in_proj_qkv.weight"] = matrix(conv, d)
            out[f"{at}.linear_attn.in_proj_z.weight"] = matrix(nv, d)
            out[f"{at}.linear_attn.in_proj_b.weight"] = matrix(hv, d)
            out[f"{at}.linear_attn.in_proj_a.weight"] = matrix(hv, d)
            out[f"{at}.linear_attn.conv1d.weight"] = matrix(conv, 1, text["linear_conv_kernel_dim"])
            out[f"{at}.linear_attn.A_log"] = torch.rand(hv, generator=gen).mul(15).add(1).log()
            out[f"{at}.linear_attn.dt_bias"] = vector(hv, 1.0)
            out[f"{at}.linear_attn.norm.weight"] = vector(dv, 1.0)
            out[f"{at}.linear_attn.out_proj.weight"] = matrix(d, nv)
        out[f"{at}.post_attention_layernorm.weight"] = vector(d)
        out[f"{at}.mlp.gate.weight"] = matrix(e, d, gain=2.0)
        gate_up, down = matrix(e, 2 * f, d), matrix(e, d, f)
        if layout == "fused":
            out[f"{at}.mlp.experts.gate_up_proj"] = gate_up
            out[f"{at}.mlp.experts.down_proj"] = down
        else:
            for i in range(e):
                out[f"{at}.mlp.experts.{i}.gate_proj.weight"] = gate_up[i, :f].clone()
                out[f"{at}.mlp.experts.{i}.up_proj.weight"] = gate_up[i, f:].clone()
                out[f"{at}.mlp.experts.{i}.down_proj.weight"] = down[i].clone()
        out[f"{at}.mlp.shared_expert.gate_proj.weight"] = matrix(s, d)
        out[f"{at}.mlp.shared_expert.up_proj.weight"] = matrix(s, d)
        out[f"{at}.mlp.shared_expert.down_proj.weight"] = matrix(d, s)
        out[f"{at}.mlp.shared_expert_gate.weight"] = matrix(1, d)

    out[f"{prefix}embed_tokens.weight"] = torch.randn((text["vocab_size"], d), generator=gen) * 0.5
    for i, kind in enumerate(text["layer_types"]):
        layer(f"{prefix}layers.{i}", kind == "full_attention")
    out[f"{prefix}norm.weight"] = vector(d)
    if not text["tie_word_embeddings"]:
        out["lm_head.weight"] = matrix(text["vocab_size"], d, gain=2.0)
    if text["mtp_num_hidden_layers"]:
        out["mtp.fc.weight"] = matrix(d, 2 * d)
        out["mtp.pre_fc_norm_embedding.weight"] = vector(d)
        out["mtp.pre_fc_norm_hidden.weight"] = vector(d)
        layer("mtp.layers.0", True)
        out["mtp.norm.weight"] = vector(d)
    if "vision_config" in config:
        out.update(_vision_tensors(config["vision_config"], gen))
    return out


def _vision_tensors(vision: Mapping[str, Any], gen: torch.Generator) -> dict[str, Tensor]:
    width, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    merged = width * vision["spatial_merge_size"] ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (width, vision["in_channels"], vision["temporal_patch_size"], patch, patch),
        "patch_embed.proj.bias": (width,),
        "pos_embed.weight": (vision["num_position_embeddings"], width),
        "merger.norm.weight": (width,),
        "merger.norm.bias": (width,),
        "merger.linear_fc1.weight": (merged, merged),
        "merger.linear_fc1.bias": (merged,),
        "merger.linear_fc2.weight": (vision["out_hidden_size"], merged),
        "merger.linear_fc2.bias": (vision["out_hidden_size"],),
    }
    for i in range(vision["depth"]):
        block = f"blocks.{i}."
        shapes |= {
            block + "norm1.weight": (width,),
            block + "norm1.bias": (width,),
            block + "norm2.weight": (width,),
            block + "norm2.bias": (width,),
            block + "attn.qkv.weight": (3 * width, width),
            block + "attn.qkv.bias": (3 * width,),
            block + "attn.proj.weight": (width, width),
            block + "attn.proj.bias": (width,),
            block + "mlp.linear_fc1.weight": (inner, width),
            block + "mlp.linear_fc1.bias": (inner,),
            block + "mlp.linear_fc2.weight": (width, inner),
            block + "mlp.linear_fc2.bias": (width,),
        }
    return {f"model.visual.{name}": torch.randn(shape, generator=gen) * 0.1 for name, shape in shapes.items()}


def save_checkpoint(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, shards: int = 2) -> None:
    """Write a hub-style folder: one ``model.safetensors``, or ``shards`` files of equal counts and their index."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    names = list(tensors)
    metadata = {"format": "pt"}
    if shards == 1:
        save_file({name: tensors[name].contiguous() for name in names}, path / "model.safetensors", metadata)
        return
    weight_map: dict[str, str] = {}
    for i, part in enumerate(_even_parts(names, shards)):
        shard = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name].contiguous() for name in part}, path / shard, metadata)
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _even_parts(names: list[str], parts: int) -> Iterable[list[str]]:
    bounds = [round(i * len(names) / parts) for i in range(parts + 1)]
    return (names[a:b] for a, b in pairwise(bounds))


def make_tiny(
    path: Path,
    *,
    layout: Layout = "fused",
    naming: Naming = "vl",
    dtype: torch.dtype = torch.bfloat16,
    mtp: bool = True,
    vision: bool = True,
    tie: bool = False,
    shards: int = 2,
    seed: int = 0,
    group: int = 32,
    experts: int = 6,
    layers: int = 3,
    shared: int | None = None,
    real_heads: bool = False,
) -> ModelConfig:
    """Write a tiny random checkpoint into the folder ``path`` and return what its ``config.json`` says.

    The same seed gives the same weights in both expert layouts and both namings.
    """
    vision = vision and naming == "vl"
    config = tiny_config(
        naming=naming, mtp=mtp, vision=vision, tie=tie, group=group, experts=experts, layers=layers, shared=shared,
        real_heads=real_heads,
    )  # fmt: skip
    config["dtype"] = str(dtype).removeprefix("torch.")
    tensors = tiny_tensors(config, layout=layout, seed=seed)
    save_checkpoint(path, config, {name: tensor.to(dtype) for name, tensor in tensors.items()}, shards=shards)
    return ModelConfig.from_dict(config)
