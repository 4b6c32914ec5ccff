"""The tiny text model of these tests: no two sizes coincide, and well conditioned enough to compare in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reference_model.attention import AttentionKind
from reference_model.config import ModelConfig, TextConfig
from reference_model.load import TensorDictSource, load_weights
from reference_model.model import CausalLM
from tests.checkpoints import tiny_config, tiny_tensors


def config_json(**changes: Any) -> dict[str, Any]:
    """A text-only ``config.json``: linear, full, linear, linear attention; 3 of 7 experts, six query heads."""
    config = tiny_config(naming="text", layers=4, experts=7)
    return config | {"num_experts_per_tok": 3, "num_attention_heads": 6, "linear_num_value_heads": 6} | changes


def text_config(**changes: Any) -> TextConfig:
    return ModelConfig.from_dict(config_json(**changes)).text


def checkpoint(seed: int = 0, **changes: Any) -> dict[str, Tensor]:
    """Weights by hub name, fp32.

    Residual branches are halved and embeddings doubled: in a trained model, too, the stream outweighs each branch.
    Otherwise the gated norm, which divides small reads of the memory by their size, makes fp32 noise of every model
    larger than the tolerance.
    """
    tensors = tiny_tensors(config_json(**changes), seed=seed)
    for name, tensor in tensors.items():
        if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight", "down_proj")):
            tensor.mul_(0.5)
        elif name.endswith("embed_tokens.weight"):
            tensor.mul_(2.0)
    return tensors


def source(tensors: dict[str, Tensor]) -> TensorDictSource:
    return TensorDictSource({name.removeprefix("model."): tensor for name, tensor in tensors.items()})


def model(
    tensors: dict[str, Tensor],
    dtype: torch.dtype = torch.float32,
    attention: AttentionKind = "sdpa",
    **changes: Any,
) -> CausalLM:
    with torch.device("meta"):
        built = CausalLM(text_config(**changes), attention)
    load_weights(built, source(tensors), dtype)
    return built.requires_grad_(False)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    vocabulary: int = config_json()["vocab_size"]
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))
