"""`genai_config.json`: what onnxruntime-genai must know to run a package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qconvert.core.errors import SourceError
from qconvert.io.source_folder import (
    EMBEDDING_FILE,
    GENAI_CONFIG,
    GENAI_PROCESSOR,
    MODEL_FILE,
    MTP_FILE,
    VISION_FILE,
    read_whole,
)
from qconvert.io.strict_json import parse_object
from qconvert.onnx_export.end_tokens import end_tokens, generation_config
from qconvert.onnx_export.precision import CPU
from qconvert.onnx_export.states import (
    HIDDEN_OUT,
    HIDDEN_STATES,
    IMAGE_FEATURES,
    IMAGE_GRID,
    INPUT_IDS,
    INPUTS_EMBEDS,
    LOGITS,
    PIXEL_VALUES,
)
from reference_model.config import ModelConfig, TextConfig, VisionConfig

_SEARCH = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")


def genai_config(
    model: ModelConfig, source: Path, *, mtp_layers: int, vision: VisionConfig | None = None, ep: str = CPU
) -> dict[str, Any]:
    """The runtime's configuration of a package; sampling defaults are those of ``generation_config.json``.

    With a tower ``vision`` the decoder takes embeddings. The prediction head, of ``mtp_layers`` layers or none, is
    named without ``shared_initializers``: with them 0.18 does not load on a CPU. Embedding and head stand once on the
    disk all the same.

    Source: onnxruntime-genai 0.18, model types ``qwen3_5_moe_text`` and ``qwen3_5_moe``.
    """
    config = model.text
    generation = generation_config(source)
    eos = list(end_tokens(config, generation))
    first_eos = eos[0] if eos else None
    return {
        "model": {
            "bos_token_id": generation.get("bos_token_id", first_eos),
            "context_length": config.max_position_embeddings,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": _providers(ep)},
                "filename": MODEL_FILE,
                "head_size": config.head_dim,
                "hidden_size": config.hidden_size,
                "inputs": {
                    **({INPUTS_EMBEDS: INPUTS_EMBEDS} if vision else {INPUT_IDS: INPUT_IDS}),
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                    "past_conv_names": "past.%d.conv",
                    "past_recurrent_names": "past.%d.recurrent",
                },
                "outputs": {
                    "logits": LOGITS,
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                    "present_conv_names": "present.%d.conv",
                    "present_recurrent_names": "present.%d.recurrent",
                    **({"hidden_states": HIDDEN_STATES} if mtp_layers else {}),
                },
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "num_key_value_heads": config.num_key_value_heads,
                "layer_types": list(config.layer_types),
            },
            "eos_token_id": eos,
            "pad_token_id": generation.get("pad_token_id", first_eos),
            "type": "qwen3_5_moe" if vision else "qwen3_5_moe_text",
            "vocab_size": config.vocab_size,
            **(_pictures(model, vision, ep) if vision else {}),
            **({"mtp": _prediction_head(config, mtp_layers, ep)} if mtp_layers else {}),
        },
        "search": {
            "do_sample": False,
            "early_stopping": True,
            "length_penalty": 1.0,
            "max_length": config.max_position_embeddings,
            "min_length": 0,
            "no_repeat_ngram_size": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": False,
            **{key: generation[key] for key in _SEARCH if key in generation},
        },
    }


def provider_of(folder: Path) -> str:
    """The provider that the package in ``folder`` was exported for, as ``--ep`` names it.

    Raises:
        SourceError: its configuration is missing or damaged.
    """
    path = folder / GENAI_CONFIG
    config = parse_object(read_whole(path), str(path))
    try:
        providers = config["model"]["decoder"]["session_options"]["provider_options"]
        return str(next(iter(providers[0]))) if providers else CPU
    except (KeyError, TypeError, IndexError, StopIteration):
        raise SourceError(f"{path} is no configuration of a package: it names no provider_options") from None


def _providers(ep: str) -> list[dict[str, Any]]:
    """Where a graph runs; nothing said means the CPU."""
    return [] if ep == CPU else [{ep: {}}]


def _session(ep: str) -> dict[str, Any]:
    """Options of a graph beside the decoder, which onnxruntime-genai runs on the CPU where there are none."""
    return {} if ep == CPU else {"session_options": {"provider_options": _providers(ep)}}


def _pictures(model: ModelConfig, vision: VisionConfig, ep: str) -> dict[str, Any]:
    """The graphs before the decoder, and the tokens from which the runtime makes three positions."""
    return {
        "embedding": {
            "filename": EMBEDDING_FILE,
            **_session(ep),
            "inputs": {INPUT_IDS: INPUT_IDS, IMAGE_FEATURES: IMAGE_FEATURES},
            "outputs": {INPUTS_EMBEDS: INPUTS_EMBEDS},
        },
        "vision": {
            "filename": VISION_FILE,
            **_session(ep),
            "config_filename": GENAI_PROCESSOR,
            "patch_size": vision.patch_size,
            "spatial_merge_size": vision.spatial_merge_size,
            "inputs": {PIXEL_VALUES: PIXEL_VALUES, IMAGE_GRID: IMAGE_GRID},
            "outputs": {IMAGE_FEATURES: IMAGE_FEATURES},
        },
        "image_token_id": model.image_token_id,
        "video_token_id": model.video_token_id,
        "vision_start_token_id": model.vision_start_token_id,
    }


def _prediction_head(config: TextConfig, layers: int, ep: str) -> dict[str, Any]:
    return {
        "enabled": True,
        "filename": MTP_FILE,
        **_session(ep),
        "num_hidden_layers": layers,
        "num_key_value_heads": config.num_key_value_heads,
        "head_size": config.head_dim,
        "main_hidden_states": HIDDEN_STATES,
        "inputs": {
            INPUT_IDS: INPUT_IDS,
            "hidden_states": HIDDEN_STATES,
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": LOGITS,
            "hidden_states": HIDDEN_OUT,
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
