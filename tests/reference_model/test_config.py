"""config.json: what is read, and what is refused with which words."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from reference_model.config import ModelConfig
from reference_model.config_fields import ConfigError
from reference_model.multimodal import MultimodalLM
from reference_model.presets import PRESETS
from tests.checkpoints import tiny_config
from tests.reference_model import tiny


@pytest.mark.parametrize(
    ("name", "total", "active"), [("35b-a3b", 35, 3), ("122b-a10b", 122, 10), ("397b-a17b", 397, 17)]
)
def test_public_sizes_have_the_advertised_parameters(name: str, total: int, active: int) -> None:
    """Billions, rounded: of the decoder without its prediction head, or of decoder and tower; 122 only the former."""
    config = PRESETS[name]
    text = replace(config.text, mtp_num_hidden_layers=0)
    with torch.device("meta"):
        sizes = {key: weight.numel() for key, weight in MultimodalLM(replace(config, text=text)).named_parameters()}
    tower = sum(size for key, size in sizes.items() if key.startswith("visual."))
    routed = sum(size for key, size in sizes.items() if ".experts." in key)
    decoder = sum(sizes.values()) - tower
    assert total in {round(decoder / 1e9), round((decoder + tower) / 1e9)}
    assert round((decoder - routed + routed * text.num_experts_per_tok / text.num_experts) / 1e9) == active


def test_the_nested_and_the_flat_form_say_the_same() -> None:
    nested = ModelConfig.from_dict(tiny_config(naming="vl"))
    flat = ModelConfig.from_dict(tiny_config(naming="text"))
    assert nested.text == flat.text
    assert flat.vision is None
    assert nested.vision is not None
    assert nested.image_token_id == 410


def test_an_interval_says_which_layers_attend() -> None:
    config = tiny.config_json(num_hidden_layers=9, full_attention_interval=3)
    del config["layer_types"]
    assert [kind == "full_attention" for kind in ModelConfig.from_dict(config).text.layer_types] == [
        False,
        False,
        True,
    ] * 3
    del config["full_attention_interval"]
    assert ModelConfig.from_dict(config).text.layer_types.index("full_attention") == 3


ROPE = tiny.config_json()["rope_parameters"]


@pytest.mark.parametrize("where", ["text", "top"])
@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_the_block_that_replaces_rope_scaling_says_everything(where: str, kind: str) -> None:
    config = tiny_config(naming="vl")
    yarn = {"factor": 3.0, "original_max_position_embeddings": 1000}
    (config if where == "top" else config["text_config"])["rope_scaling"] = {kind: "yarn", **yarn}
    with pytest.raises(ConfigError, match="rope_scaling") as caught:
        ModelConfig.from_dict(config)
    block = json.loads("{" + str(caught.value).partition("\n")[2] + "}")["rope_parameters"]
    assert block == {**config["text_config"]["rope_parameters"], "rope_type": "yarn", **yarn}
    text = {name: value for name, value in config["text_config"].items() if name != "rope_scaling"}
    config = {**config, "text_config": {**text, "rope_parameters": block}, "rope_scaling": None}
    assert ModelConfig.from_dict(config).text.rope.factor == 3.0


def test_a_block_beside_the_text_config_is_refused_and_not_passed_over() -> None:
    config = tiny_config(naming="vl")
    own = config["text_config"]["rope_parameters"]
    with pytest.raises(ConfigError, match="beside 'text_config'") as caught:
        ModelConfig.from_dict({**config, "rope_parameters": {"rope_type": "yarn", "factor": 3.0}})
    block = json.loads("{" + str(caught.value).partition("\n")[2] + "}")["rope_parameters"]
    assert block == {**own, "rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 262_144}


def test_a_block_without_theta_or_sections_is_completed_by_the_public_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        tiny.text_config(rope_parameters={"rope_type": "yarn", "factor": 2.0})
    block = json.loads("{" + str(caught.value).partition("\n")[2] + "}")["rope_parameters"]
    assert (block["rope_theta"], block["mrope_section"], block["factor"]) == (10_000_000, [11, 11, 10], 2.0)
    assert block["original_max_position_embeddings"] == 262_144


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "qwen3_5"}, "'qwen3_5'.*dense"),
    ({"model_type": "qwen3_next"}, "'qwen3_next'.*DeltaNet"),
    ({"model_type": "qwen3_moe"}, "'qwen3_moe'"),
    ({"model_type": "llama"}, "'llama'"),
    ({"model_type": None}, "None"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.*(?s:.*)original_max_position_embeddings"),
    ({"rope_parameters": None}, "no 'rope_parameters'"),
    ({"rope_parameters": None, "rope_theta": 5e6}, r"no 'rope_parameters'.*(?s:.*)\"rope_theta\": 5000000.0"),
    ({"rope_parameters": {"mrope_section": [2, 2, 1]}, "rope_theta": 5e6}, r"no 'rope_theta'(?s:.*): 5000000.0"),
    ({"rope_scaling": {"type": "yarn"}, "rope_parameters": None, "rope_theta": 5e6}, r"scaling(?s:.*): 5000000.0"),
    ({"rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 1]}}, "no 'rope_theta'"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e7}}, "no 'mrope_section'"),
    ({"rope_parameters": {**ROPE, "rope_type": "linear"}}, "'linear'"),
    ({"rope_parameters": {**ROPE, "mrope_interleaved": False}}, "interleave"),
    ({"rope_parameters": {**ROPE, "mrope_section": [2, 2]}}, "three counts"),
    ({"rope_parameters": {**ROPE, "mrope_section": [2, 2, 2]}}, "sum to 5"),
    ({"rope_parameters": {**ROPE, "mrope_section": [1, 2, 2]}}, "do not fit"),
    ({"rope_parameters": {**ROPE, "mrope_section": [1, 3, 1]}}, "do not fit"),
    ({"rope_parameters": {**ROPE, "rope_theta": "big"}}, "rope_theta is 'big'"),
    ({"rope_parameters": {**ROPE, "partial_rotary_factor": 0.225}}, "9 of 40"),
    ({"hidden_size": None}, "hidden_size is None"),
    ({"hidden_size": 96.5}, "hidden_size is 96.5"),
    ({"num_experts": 0}, "num_experts is 0"),
    ({"num_experts_per_tok": 8}, "num_experts_per_tok 8 exceeds"),
    ({"num_key_value_heads": 4}, "no multiple"),
    ({"linear_num_key_heads": 4}, "no multiple"),
    ({"layer_types": ["linear_attention"]}, "1 entries for 4 layers"),
    ({"layer_types": ["linear_attention", "sliding", "full_attention", "full_attention"]}, "'sliding'"),
    ({"hidden_act": "gelu"}, "'gelu'"),
    ({"attn_output_gate": False}, "attn_output_gate"),
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_only_layers": [0]}, "mlp_only_layers"),
    ({"mtp_use_dedicated_embeddings": True}, "mtp_use_dedicated_embeddings"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
]


@pytest.mark.parametrize(("change", "words"), FAULTS)
def test_what_this_model_cannot_be_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ModelConfig.from_dict(tiny.config_json(**change))


def test_a_vision_tower_must_fit_the_decoder() -> None:
    config = tiny_config()
    config["vision_config"] = {**config["vision_config"], "out_hidden_size": 95}
    with pytest.raises(ConfigError, match="out_hidden_size 95 differs"):
        ModelConfig.from_dict(config)


@pytest.mark.parametrize(("content", "words"), [(None, "cannot read"), ("{", "not JSON"), ("[]", "no JSON object")])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=words) as caught:
        ModelConfig.from_file(path)
    assert str(path) in str(caught.value)


def test_a_faulty_file_is_named_with_its_fault(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny.config_json(num_experts=0)), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config\.json: num_experts is 0"):
        ModelConfig.from_file(path)


def fields_of(block: dict[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in block.items():
        yield (*at, name)
        if isinstance(value, dict):
            yield from fields_of(value, (*at, name))


@pytest.mark.parametrize("value", [None, 5, -1, 0, "x", [], [1], {}, 1.5, float("nan"), True, float("inf")], ids=repr)
def test_any_value_of_any_field_is_read_or_refused_by_name(value: object) -> None:
    whole = tiny_config()
    for path in fields_of(whole):
        config = copy.deepcopy(whole)
        block: Any = config
        for name in path[:-1]:
            block = block[name]
        block[path[-1]] = value
        try:
            read = ModelConfig.from_dict(config)
        except ConfigError as error:
            assert str(error)
            continue
        numbers = (read.text.rms_norm_eps, read.text.rope.rope_theta, read.text.rope.partial_rotary_factor)
        assert all(math.isfinite(number) and number > 0 for number in numbers), path
        assert type(read.text.tie_word_embeddings) is bool
        assert type(read.text.mtp_num_hidden_layers) is int and read.text.mtp_num_hidden_layers >= 0
