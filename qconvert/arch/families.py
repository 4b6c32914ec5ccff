"""Which checkpoints are supported, and what people call them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qconvert.core.errors import SourceError
from qconvert.core.tensor_info import TensorInfo
from reference_model.config import ModelConfig, TextConfig
from reference_model.config_fields import ConfigError
from reference_model.presets import PRESETS

SUPPORTED_ARCHITECTURES = ("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeForCausalLM")

_QUANTIZED_SUFFIXES = (
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_zero_point",
    ".weight_global_scale",
    ".qweight",
    ".qzeros",
    ".scales",
    ".absmax",
    "_scale_inv",
    "_blocks",
    "_scales",
)


def read_config(config: Mapping[str, Any], path: Path) -> ModelConfig:
    """The configuration of a checkpoint.

    Args:
        config: parsed ``config.json``.
        path: the folder, for messages.

    Raises:
        SourceError: another architecture (the message names its type), or a field that is missing or wrong.
    """
    try:
        result = ModelConfig.from_dict(config)
    except (ConfigError, TypeError, ValueError) as error:
        raise SourceError(f"{path / 'config.json'}: {error}") from error
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list):
        raise SourceError(f"{path / 'config.json'}: architectures is {architectures!r}; expected a list of names")
    other = next((name for name in architectures if name not in SUPPORTED_ARCHITECTURES), None)
    if other is not None:
        raise SourceError(
            f"{path / 'config.json'}: architecture {other!r} is not supported, "
            f"expected {' or '.join(SUPPORTED_ARCHITECTURES)}"
        )
    return result


def reject_quantized(config: Mapping[str, Any], path: Path, tensors: Mapping[str, TensorInfo] | None = None) -> None:
    """Refuse a source that is quantized already.

    Raises:
        SourceError: ``config`` has a ``quantization_config``, or a tensor is named or typed like a quantized one.
    """
    method = quant_method(config)
    if method is not None:
        raise SourceError(
            f"{path}: already quantized (quant_method {method!r}); quantize the original BF16 checkpoint instead, or "
            "dequantize this one first with --from-quantized (from_quantized=True)"
        )
    for name, info in (tensors or {}).items():
        if name.endswith(_QUANTIZED_SUFFIXES) or not info.dtype.is_weight:
            raise SourceError(
                f"{path / info.shard}: already quantized, though config.json does not say so, {name!r} is "
                f"{info.dtype}; "
                "quantize the original BF16 checkpoint instead"
            )


def quant_method(config: Mapping[str, Any]) -> str | None:
    """The ``quant_method`` that a configuration declares, in either place; ``None`` for an unquantized checkpoint."""
    for block in (config, config.get("text_config")):
        quantization = block.get("quantization_config") if isinstance(block, Mapping) else None
        if quantization:
            return str(quantization.get("quant_method")) if isinstance(quantization, Mapping) else "unknown"
    return None


def size_name(config: ModelConfig) -> str:
    """What the size is called, such as ``35B-A3B``; ``custom size`` for one that is not public."""
    for name, preset in PRESETS.items():
        if _sizes(preset.text) == _sizes(config.text):
            return name.upper()
    return "custom size"


def describe(config: ModelConfig) -> str:
    """One line for people: family, size, modalities, and whether the shared expert is folded."""
    tower = "vision-language" if config.vision is not None else "text-only"
    count = config.text.folded_experts
    folded = f", shared expert folded into {count} more expert{'s' if count > 1 else ''}" if count else ""
    return f"Qwen3.5-MoE {size_name(config)}, {tower}{folded}"


def _sizes(c: TextConfig) -> tuple[int, ...]:
    return (
        c.hidden_size,
        c.num_hidden_layers,
        c.num_attention_heads,
        c.linear_num_value_heads,
        c.num_experts,
        c.num_experts_per_tok,
        c.moe_intermediate_size,
        c.vocab_size,
    )
