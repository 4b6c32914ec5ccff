"""Names and roles are one table read in both directions."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, Qwen3_5MoeForCausalLM, Qwen3_5MoeForConditionalGeneration

from qconvert.arch.names import Naming, module_of, name_of, naming_of, role_of
from qconvert.arch.shapes import expected_roles, expected_shape
from qconvert.core.errors import SourceError
from qconvert.core.role import Kind, Part, Section, TensorRole
from reference_model.config import ModelConfig
from reference_model.presets import PRESETS
from tests.checkpoints import Layout, tiny_config, tiny_tensors
from tests.checkpoints import Naming as TinyNaming

CONFIGS = {
    "tiny": ModelConfig.from_dict(tiny_config()),
    "tiny text": ModelConfig.from_dict(tiny_config(naming="text", tie=True, mtp=False)),
    "35B-A3B": PRESETS["35b-a3b"],
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("naming", Naming)
@pytest.mark.parametrize("stacked", [True, False])
def test_names_and_roles_are_inverse(config: str, naming: Naming, stacked: bool) -> None:
    roles = list(expected_roles(CONFIGS[config], stacked=stacked))
    names = [name_of(role, naming) for role in roles]
    assert len(set(names)) == len(names)
    assert [role_of(name) for name in names] == roles
    assert naming_of(names) is naming


@pytest.mark.parametrize("layout", ["fused", "per-expert"])
@pytest.mark.parametrize("naming", ["vl", "text"])
def test_every_name_of_a_checkpoint_has_a_role_and_back(layout: Layout, naming: TinyNaming) -> None:
    config = tiny_config(naming=naming, vision=naming == "vl")
    tensors = tiny_tensors(config, layout=layout)
    found = naming_of(tensors)
    assert {name_of(role_of(name), found) for name in tensors} == set(tensors)
    expected = expected_roles(ModelConfig.from_dict(config), stacked=layout == "fused")
    assert {name_of(role, found) for role in expected} == set(tensors)


@pytest.mark.parametrize("naming", ["vl", "text"])
def test_names_and_shapes_are_those_of_transformers(naming: TinyNaming) -> None:
    config = tiny_config(naming=naming, vision=naming == "vl", mtp=False)
    upstream = AutoConfig.for_model(**{k: v for k, v in config.items() if k != "architectures"})
    kind = Qwen3_5MoeForConditionalGeneration if naming == "vl" else Qwen3_5MoeForCausalLM
    with torch.device("meta"):
        model = kind(upstream)
    ours = ModelConfig.from_dict(config)
    found = {"vl": Naming.VISION_LANGUAGE, "text": Naming.TEXT}[naming]
    assert {name_of(role, found): expected_shape(role, ours) for role in expected_roles(ours)} == {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
    }


VALUES = {
    "model.language_model.layers.3.self_attn.q_proj.weight": (Section.TEXT, Kind.ATTENTION_QUERY, 3, None),
    "model.layers.0.linear_attn.A_log": (Section.TEXT, Kind.LINEAR_A_LOG, 0, None),
    "model.layers.12.mlp.experts.255.up_proj.weight": (Section.TEXT, Kind.EXPERT_UP, 12, 255),
    "model.layers.12.mlp.experts.down_proj": (Section.TEXT, Kind.EXPERT_DOWN, 12, None),
    "mtp.layers.0.mlp.experts.7.gate_proj.weight": (Section.MTP, Kind.EXPERT_GATE, 0, 7),
    "mtp.layers.0.mlp.gate.weight": (Section.MTP, Kind.ROUTER, 0, None),
    "mtp.norm.weight": (Section.MTP, Kind.NORM, None, None),
    "model.visual.blocks.26.mlp.linear_fc1.weight": (Section.VISION, Kind.BLOCK_FC1, 26, None),
    "lm_head.weight": (Section.TEXT, Kind.HEAD, None, None),
}


@pytest.mark.parametrize("name", VALUES)
def test_roles_mean_what_they_say(name: str) -> None:
    section, kind, layer, expert = VALUES[name]
    assert role_of(name) == TensorRole(section=section, kind=kind, layer=layer, expert=expert)


UNKNOWN = [
    "",
    "model",
    "model.layers.0",
    "model.layers.00.input_layernorm.weight",
    "model.layers.-1.input_layernorm.weight",
    "model.layers.#.input_layernorm.weight",
    "model.layers.{layer}.input_layernorm.weight",
    "model.layers.٣.input_layernorm.weight",
    "model.layers.0.input_layernorm.weight\n",
    "model.layers.0.input_layernorm.bias",
    "model.layers.99999999999.input_layernorm.weight",
    "model.layers." + "9" * 5000 + ".input_layernorm.weight",
    "model.layers.0.mlp.experts.gate_up_proj.weight",
    "model.layers.0.mlp.experts.0.gate_up_proj.weight",
    "model.layers.0.mlp.experts.0.gate_proj.weight_packed",
    "model.layers.0.mlp.gate_proj.weight",
    "model.visual.deepstack_merger_list.0.norm.weight",
    "mtp.lm_head.weight",
    "visual.pos_embed.weight",
]


@pytest.mark.parametrize("name", UNKNOWN, ids=lambda name: name[:40])
def test_other_names_are_refused_by_name(name: str) -> None:
    with pytest.raises(SourceError, match=re.escape(repr(name))):
        role_of(name)


@given(st.text(st.sampled_from("model.visualayers0123#experts_projweight."), max_size=60))
def test_no_name_has_a_role_unless_the_role_has_the_name(name: str) -> None:
    try:
        role = role_of(name)
    except SourceError:
        return
    assert name in {name_of(role, naming) for naming in Naming}


@pytest.mark.parametrize(
    "role",
    [
        TensorRole(section=Section.TEXT, kind=Kind.ATTENTION_QUERY, layer=0, part=Part.OUTPUT_GATE),
        TensorRole(section=Section.TEXT, kind=Kind.EXPERT_GATE, layer=0),
        TensorRole(section=Section.TEXT, kind=Kind.NORM, layer=0),
        TensorRole(section=Section.VISION, kind=Kind.ROUTER, layer=0),
    ],
    ids=str,
)
def test_a_role_without_a_tensor_has_no_name(role: TensorRole) -> None:
    with pytest.raises(ValueError, match=f"no tensor is stored for the role {re.escape(str(role))}"):
        name_of(role, Naming.TEXT)


def test_two_prefixes_in_one_checkpoint_are_refused() -> None:
    names = ["lm_head.weight", "model.layers.0.mlp.gate.weight", "model.language_model.layers.1.mlp.gate.weight"]
    with pytest.raises(SourceError, match=r"two prefixes: 'model\.layers\.0.*' and 'model\.language_model"):
        naming_of(names)
    with pytest.raises(SourceError, match=r"two prefixes: 'model\.language_model.*' and 'model\.norm"):
        naming_of([*names[2:], "model.visual.pos_embed.weight", "model.norm.weight"])


def test_the_module_is_the_name_without_its_part() -> None:
    assert module_of("model.layers.0.mlp.gate.weight") == "model.layers.0.mlp.gate"
    assert module_of("model.visual.blocks.0.attn.qkv.bias") == "model.visual.blocks.0.attn.qkv"
    assert module_of("mtp.layers.0.mlp.experts.gate_up_proj") == "mtp.layers.0.mlp.experts.gate_up_proj"
