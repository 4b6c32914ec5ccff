"""Other architectures and quantized sources are refused with the word that a user looks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qconvert.arch.families import describe, read_config, reject_quantized, size_name
from qconvert.core.dtypes import DType
from qconvert.core.errors import SourceError
from qconvert.core.tensor_info import TensorInfo
from reference_model.config import ModelConfig
from reference_model.presets import PRESETS
from tests.checkpoints import tiny_config

FOLDER = Path("folder")


def without(config: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != name}


TEXT = tiny_config(naming="text")
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "dense": ({**TEXT, "model_type": "qwen3_5"}, "'qwen3_5'.*dense Qwen3.5"),
    "dense text": ({**TEXT, "model_type": "qwen3_5_text"}, "'qwen3_5_text'.*dense"),
    "Qwen3-Next": ({**TEXT, "model_type": "qwen3_next"}, "'qwen3_next'.*Qwen3-Next"),
    "Qwen3-MoE": ({**TEXT, "model_type": "qwen3_moe"}, "'qwen3_moe'"),
    "Llama": ({"model_type": "llama"}, "'llama'"),
    "no type": ({}, "None"),
    "another head": ({**TEXT, "architectures": ["Qwen3_5MoeForSequenceClassification"]}, "SequenceClassification"),
    "a missing size": (without(TEXT, "num_experts"), "num_experts is None"),
    "a size in words": ({**TEXT, "hidden_size": "large"}, "hidden_size is 'large'"),
    "an epsilon in words": ({**TEXT, "rms_norm_eps": "small"}, "small"),
    "a list in place of a number": ({**TEXT, "rms_norm_eps": [1]}, "config.json"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_configurations_are_refused_by_name(other: str) -> None:
    config, expected = OTHERS[other]
    with pytest.raises(SourceError, match=expected) as caught:
        read_config(config, FOLDER)
    assert str(caught.value).startswith("folder/config.json: ")


@pytest.mark.parametrize("naming", ["vl", "text"])
def test_ours_are_read(naming: Any) -> None:
    config = tiny_config(naming=naming)
    assert read_config(config, FOLDER) == ModelConfig.from_dict(config)
    assert read_config(without(config, "architectures"), FOLDER) == ModelConfig.from_dict(config)


@pytest.mark.parametrize("method", ["compressed-tensors", "gptq", "fp8"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_quantized_source_is_refused_with_its_method(method: str, nested: bool) -> None:
    block = {"quantization_config": {"quant_method": method}}
    config = {"text_config": block} if nested else block
    with pytest.raises(SourceError, match=f"already quantized .*'{method}'"):
        reject_quantized(config, FOLDER)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("a.weight", DType.F8_E4M3),
        ("a.weight_packed", DType.I32),
        ("a.weight_scale", DType.BF16),
        ("a.qzeros", DType.I32),
    ],
)
def test_quantized_tensors_are_noticed_without_a_configuration(name: str, dtype: DType) -> None:
    info = TensorInfo(name=name, dtype=dtype, shape=(1,), shard="model.safetensors", begin=0, end=dtype.itemsize)
    with pytest.raises(SourceError, match=f"folder/model.safetensors: already quantized.*'{name}' is {dtype}"):
        reject_quantized({}, FOLDER, {name: info})


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"text_config": {"quantization_config": {}}}])
def test_an_empty_block_is_no_quantization(config: dict[str, Any]) -> None:
    info = TensorInfo(name="a.weight", dtype=DType.BF16, shape=(1,), shard="a", begin=0, end=2)
    reject_quantized(config, FOLDER, {"a.weight": info})


def test_sizes_have_the_names_that_people_use() -> None:
    assert {size_name(config) for config in PRESETS.values()} == {"35B-A3B", "122B-A10B", "397B-A17B"}
    assert describe(PRESETS["35b-a3b"]) == "Qwen3.5-MoE 35B-A3B, vision-language"
    assert describe(ModelConfig.from_dict(TEXT)) == "Qwen3.5-MoE custom size, text-only"
