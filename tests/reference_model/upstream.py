"""The same weights in transformers, and a way to run it in true fp64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import (
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
)
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeVisionConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeVisionModel


def build(config: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model with these weights; its rotary frequencies stay fp32 in every dtype."""
    model = Qwen3_5MoeForCausalLM._from_config(
        Qwen3_5MoeTextConfig(**config), experts_implementation="eager", attn_implementation="eager"
    )
    model.load_state_dict({name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")})
    frequencies = model.model.rotary_emb.inv_freq
    model = model.to(dtype).eval().requires_grad_(False)
    model.model.rotary_emb.inv_freq = frequencies
    return model


def build_tower(config: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Any:
    """transformers' vision tower with these weights; its rotary frequencies stay fp32 in every dtype."""
    tower = Qwen3_5MoeVisionModel._from_config(Qwen3_5MoeVisionConfig(**config), attn_implementation="eager")
    tower.load_state_dict(tensors)
    frequencies = tower.rotary_pos_emb.inv_freq
    tower = tower.to(dtype).eval().requires_grad_(False)
    tower.rotary_pos_emb.inv_freq = frequencies
    return tower


def build_multimodal(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> Any:
    """transformers' whole model with these weights; its rotary frequencies stay fp32 in every dtype."""
    model = Qwen3_5MoeForConditionalGeneration._from_config(
        Qwen3_5MoeConfig(**config), experts_implementation="eager", attn_implementation="eager"
    )
    model.load_state_dict({name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")})
    rotaries = model.model.language_model.rotary_emb, model.model.visual.rotary_pos_emb
    frequencies = [rotary.inv_freq for rotary in rotaries]
    model = model.to(dtype).eval().requires_grad_(False)
    for rotary, kept in zip(rotaries, frequencies, strict=True):
        rotary.inv_freq = kept
    return model


class LiftedCasts(TorchFunctionMode):
    """While active, nothing casts an fp64 tensor down to fp32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            if func in (Tensor.to, Tensor.type):
                args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            if func in (Tensor.to, functional.softmax, torch.softmax) and kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)
