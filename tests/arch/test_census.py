"""A checkpoint fits its configuration, or one message names everything that does not."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from qconvert.arch.census import Census, check
from qconvert.arch.names import Naming, name_of, role_of
from qconvert.arch.shapes import (
    KEPT_BY_NATURE,
    LINEAR_KINDS,
    expected_roles,
    expected_shape,
    is_linear_weight,
    kept_by_nature,
)
from qconvert.core.dtypes import DType
from qconvert.core.errors import SourceError
from qconvert.core.role import EXPERT_KINDS, Kind, Part, Section, TensorRole
from qconvert.core.tensor_info import TensorInfo
from reference_model.config import ModelConfig
from reference_model.presets import PRESETS
from tests.checkpoints import Layout, tiny_config, tiny_tensors
from tests.checkpoints import Naming as TinyNaming

Tensors = dict[str, TensorInfo]


def infos(shapes: dict[str, tuple[int, ...]], dtype: DType = DType.BF16) -> Tensors:
    result, position = {}, 0
    for name, shape in shapes.items():
        end = position + torch.Size(shape).numel() * dtype.itemsize
        result[name] = TensorInfo(name=name, dtype=dtype, shape=shape, shard="a", begin=position, end=end)
        position = end
    return result


def tiny(layout: Layout = "fused", naming: TinyNaming = "vl", **options: bool) -> tuple[Tensors, ModelConfig]:
    config = tiny_config(naming=naming, **{"vision": naming == "vl", **options})  # type: ignore[arg-type]
    shapes = {name: tuple(tensor.shape) for name, tensor in tiny_tensors(config, layout=layout).items()}
    return infos(shapes), ModelConfig.from_dict(config)


def preset(name: str, *, stacked: bool = True) -> Census:
    config = PRESETS[name]
    roles = expected_roles(config, stacked=stacked)
    shapes = {name_of(role, Naming.VISION_LANGUAGE): expected_shape(role, config) for role in roles}
    return check(infos(shapes), config)


@pytest.mark.parametrize("layout", ["fused", "per-expert"])
@pytest.mark.parametrize("naming", ["vl", "text"])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("mtp", [False, True])
def test_a_right_checkpoint_passes_without_notes(layout: Layout, naming: TinyNaming, tie: bool, mtp: bool) -> None:
    tensors, config = tiny(layout, naming, tie=tie, mtp=mtp)
    census = check(tensors, config)
    assert census.notes == ()
    assert list(census.roles) == list(tensors)
    assert census.mtp_layers == mtp
    assert census.nbytes == sum(info.nbytes for info in tensors.values())
    assert sum(line.nbytes for line in census.lines()) == census.nbytes
    assert sum(line.tensors for line in census.lines()) == len(tensors)
    assert sum(census.parameters(section) for section in Section) == census.parameters()
    assert census.by_role()[role_of("mtp.fc.weight")].name == "mtp.fc.weight" if mtp else True


def test_layouts_may_differ_from_layer_to_layer() -> None:
    fused, config = tiny("fused")
    separate, _ = tiny("per-expert")
    mixed = {name: info for name, info in fused.items() if not name.startswith("mtp.layers.0.mlp.experts")}
    mixed |= {name: info for name, info in separate.items() if name.startswith("mtp.layers.0.mlp.experts")}
    census = check(mixed, config)
    assert census.parameters() == check(fused, config).parameters() == check(separate, config).parameters()
    assert census.active_parameters == check(fused, config).active_parameters


def test_gate_up_and_down_may_differ_in_layout() -> None:
    fused, config = tiny("fused")
    separate, _ = tiny("per-expert")
    mixed = {name: info for name, info in fused.items() if not name.endswith("experts.down_proj")}
    mixed |= {name: info for name, info in separate.items() if "experts" in name and "down_proj" in name}
    mixed |= {name: info for name, info in fused.items() if "shared_expert.down_proj" in name}
    assert check(mixed, config).parameters() == check(fused, config).parameters()


def drop(*names: str) -> Callable[[Tensors], object]:
    def act(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return act


def reshape(name: str, shape: tuple[int, ...]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: replace(tensors[name], shape=shape)})


def add(*names: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update(infos(dict.fromkeys(names, (4, 6))))


def retype(name: str, dtype: DType) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: replace(tensors[name], dtype=dtype)})


L1 = "model.language_model.layers.1."
FAULTS: dict[str, tuple[Layout, Callable[[Tensors], object], tuple[str, ...]]] = {
    "missing": ("fused", drop(f"{L1}self_attn.k_proj.weight"), (f"missing: {L1}self_attn.k_proj.weight",)),
    "no head": ("fused", drop("lm_head.weight"), ("missing: lm_head.weight",)),
    "no stack": ("fused", drop(f"{L1}mlp.experts.down_proj"), (f"missing: {L1}mlp.experts.down_proj",)),
    "one expert's up": (
        "per-expert",
        drop(f"{L1}mlp.experts.5.up_proj.weight"),
        (f"missing: {L1}mlp.experts.5.up_proj.weight", "differences: 1"),
    ),
    "an expert too many": (
        "per-expert",
        add(f"{L1}mlp.experts.6.up_proj.weight"),
        (f"unexpected: {L1}mlp.experts.6.up_proj.weight",),
    ),
    "a layer too many": (
        "fused",
        add("model.language_model.layers.3.mlp.gate.weight"),
        ("unexpected: model.language_model.layers.3.mlp.gate.weight",),
    ),
    "part of the MTP head": ("fused", drop("mtp.norm.weight"), ("missing: mtp.norm.weight",)),
    "a vision tensor": ("fused", drop("model.visual.merger.norm.bias"), ("missing: model.visual.merger.norm.bias",)),
    "an unknown name": (
        "fused",
        add("model.language_model.rotary.inv_freq"),
        ("unexpected: model.language_model.rot",),
    ),
    "full attention in a linear layer": (
        "fused",
        add("model.language_model.layers.0.self_attn.k_proj.weight"),
        ("unexpected: model.language_model.layers.0.self_attn.k_proj.weight",),
    ),
    "stacked and per expert": (
        "fused",
        add(f"{L1}mlp.experts.0.gate_proj.weight"),
        (f"doubled: {L1}mlp.experts.gate_up_proj", f"unexpected: {L1}mlp.experts.0.gate_proj.weight"),
    ),
    "the transpose": (
        "per-expert",
        reshape(f"{L1}mlp.experts.2.down_proj.weight", (64, 96)),
        (f"misshapen: {L1}mlp.experts.2.down_proj.weight is [64, 96], expected [96, 64]",),
    ),
    "a stack transposed": (
        "fused",
        reshape(f"{L1}mlp.experts.gate_up_proj", (6, 96, 128)),
        ("is [6, 96, 128], expected [6, 128, 96]",),
    ),
    "whole numbers": ("fused", retype("lm_head.weight", DType.I8), ("element type: lm_head.weight is I8",)),
    "everything at once": (
        "fused",
        lambda tensors: [
            drop("lm_head.weight", "mtp.fc.weight")(tensors),
            add("a", "b")(tensors),
            reshape(f"{L1}mlp.gate.weight", (1, 2))(tensors),
        ],
        (
            "missing: lm_head.weight",
            "missing: mtp.fc.weight",
            "unexpected: a",
            "unexpected: b",
            "misshapen",
            "differences: 5",
        ),
    ),
}


def test_a_vision_configuration_with_text_only_names_is_refused() -> None:
    tensors, _ = tiny(naming="text")
    vision = {name: info for name, info in tiny()[0].items() if name.startswith("model.visual.")}
    with pytest.raises(SourceError, match=r"prefix: .*'model\.language_model\.', not 'model\.'"):
        check({**tensors, **vision}, ModelConfig.from_dict(tiny_config()))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_message_that_names_it(fault: str) -> None:
    layout, act, expected = FAULTS[fault]
    tensors, config = tiny(layout)
    act(tensors)
    with pytest.raises(SourceError) as caught:
        check(tensors, config)
    for part in expected:
        assert part in str(caught.value)


def test_a_long_list_is_cut_but_counted() -> None:
    tensors, config = tiny()
    with pytest.raises(SourceError, match=r"\.\.\. and \d+ more") as caught:
        check({"lm_head.weight": tensors["lm_head.weight"]}, config)
    assert len(str(caught.value).splitlines()) == 32
    assert f"differences: {len(tensors) - 1 - sum(n.startswith('mtp.') for n in tensors)}" in str(caught.value)


def test_a_dropped_mtp_head_is_noted() -> None:
    tensors, config = tiny()
    census = check({name: info for name, info in tensors.items() if not name.startswith("mtp.")}, config)
    assert census.mtp_layers == 0
    assert len(census.notes) == 1
    assert "no mtp tensors" in census.notes[0]


def test_an_mtp_head_that_the_configuration_forgets_is_noted() -> None:
    tensors, config = tiny()
    forgetful = replace(config, text=replace(config.text, mtp_num_hidden_layers=0))
    census = check(tensors, forgetful)
    assert census.mtp_layers == 1
    assert "1 MTP layers" in census.notes[0]


def test_a_stored_head_that_is_tied_is_noted() -> None:
    tensors, config = tiny()
    census = check(tensors, replace(config, text=replace(config.text, tie_word_embeddings=True)))
    assert "lm_head.weight is stored although it is tied" in census.notes[0]


@pytest.mark.parametrize("name", PRESETS)
def test_public_sizes_have_the_parameters_that_they_advertise(name: str) -> None:
    total, active = (int(n) for n in re.findall(r"\d+", name))
    census = preset(name)
    text = census.parameters(Section.TEXT)
    with_vision = text + census.parameters(Section.VISION)
    assert total in (text // 10**9, round(text / 1e9), round(with_vision / 1e9))
    assert active in (census.active_parameters // 10**9, round(census.active_parameters / 1e9))


def test_the_vision_tower_of_the_public_sizes_has_333_tensors() -> None:
    census = preset("35b-a3b")
    assert sum(role.section is Section.VISION for role in census.roles.values()) == 333
    assert sum(role.section is Section.MTP for role in census.roles.values()) == 19
    assert sum(role.section is Section.MTP for role in preset("35b-a3b", stacked=False).roles.values()) == 785


def test_every_kind_is_either_linear_or_kept_by_nature() -> None:
    assert frozenset(KEPT_BY_NATURE).isdisjoint(LINEAR_KINDS)
    assert frozenset(KEPT_BY_NATURE) | LINEAR_KINDS == frozenset(Kind)
    config = ModelConfig.from_dict(tiny_config())
    for stacked in (True, False):
        for role in expected_roles(config, stacked=stacked):
            assert is_linear_weight(role) == (kept_by_nature(role) is None)
            if is_linear_weight(role):
                dimensions = 3 if stacked and role.kind in EXPERT_KINDS else 2
                assert len(expected_shape(role, config)) == dimensions


def test_the_halves_of_the_query_projection_have_half_its_rows() -> None:
    config = ModelConfig.from_dict(tiny_config())
    shapes = {
        part: expected_shape(TensorRole(section=Section.TEXT, kind=Kind.ATTENTION_QUERY, layer=1, part=part), config)
        for part in (Part.WEIGHT, Part.QUERY, Part.OUTPUT_GATE)
    }
    assert shapes == {Part.WEIGHT: (320, 96), Part.QUERY: (160, 96), Part.OUTPUT_GATE: (160, 96)}


def test_a_vision_role_without_a_tower_has_no_shape() -> None:
    config = ModelConfig.from_dict(tiny_config(vision=False))
    with pytest.raises(KeyError):
        expected_shape(TensorRole(section=Section.VISION, kind=Kind.POSITION_EMBEDDING), config)
