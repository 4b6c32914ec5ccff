"""What engines are told to leave alone, in every way in which they look; and what no engine would load is refused."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match

from qconvert.core.errors import FormatError, PlanError
from qconvert.core.scheme import FP8, FP8_BLOCK, INT8, Scheme, int4
from qconvert.formats.engine_rules import STACKED, ModuleDecision, exact_names, expand, ignore_list, verify, vllm_name
from qconvert.formats.quantization_config import quantization_config
from tests.checkpoints import Layout, Naming, tiny_config, tiny_tensors
from tests.formats.whole_model import Choice, decisions_for, is_linear, routed_experts

INT4 = routed_experts(int4(32), "pack-quantized")
Fields = dict[str, object]


def decide(
    choose: Choice, *, naming: Naming = "vl", mtp: Layout = "per-expert", group: int = 32
) -> list[ModuleDecision]:
    config = tiny_config(naming=naming, group=group, vision=naming == "vl")
    tensors = tiny_tensors(config, layout="per-expert")
    if mtp == "fused":
        fused = tiny_tensors(config, layout="fused")
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")}
        tensors |= {name: tensor for name, tensor in fused.items() if name.startswith("mtp.")}
    return decisions_for(tensors, choose)


def ignored(name: str, entries: list[str]) -> bool:
    """Equality, or ``re.match`` for ``re:`` entries: what vLLM, SGLang and compressed-tensors share."""
    return any(re.match(entry[3:], name) if entry.startswith("re:") else entry == name for entry in entries)


def stacks(names: list[str]) -> list[str]:
    """The modules that an engine builds out of plain ones."""
    return [
        name.removesuffix(parts[0]) + stack
        for stack, parts in STACKED
        for name in names
        if name.endswith("." + parts[0])
    ]


@pytest.mark.parametrize("mtp", ["per-expert", "fused"])
@pytest.mark.parametrize("naming", ["vl", "text"])
def test_everything_kept_is_ignored_under_every_name_and_nothing_quantized_is(naming: Naming, mtp: Layout) -> None:
    decisions = decide(INT4, naming=naming, mtp=mtp)
    entries = ignore_list(decisions)
    kept = [name for decision in decisions if decision.scheme is None for name in expand(decision)]
    mapped = [vllm_name(entry) if not entry.startswith("re:") else entry for entry in entries]
    for name in kept:
        assert ignored(name, entries), name
        assert ignored(vllm_name(name), mapped), name
    plain_patterns = [entry for entry in entries if entry.startswith("re:")]
    for name in stacks([name for name in kept if ".experts." not in name]):
        assert ignored(name, plain_patterns) and ignored(vllm_name(name), plain_patterns), name
    for decision in decisions:
        if decision.scheme is not None:
            assert not ignored(decision.name, entries) and not ignored(vllm_name(decision.name), mapped)


def test_a_text_only_class_on_a_vision_checkpoint_is_covered_by_patterns() -> None:
    decisions = decide(INT4, naming="vl")
    patterns = [entry for entry in ignore_list(decisions) if entry.startswith("re:")]
    for decision in decisions:
        if decision.scheme is None and decision.name.startswith("model.language_model."):
            assert ignored(decision.name.replace("model.language_model.", "model."), patterns), decision.name


@pytest.mark.parametrize("mtp", ["per-expert", "fused"])
def test_all_three_kinds_of_mtp_names_are_written(mtp: Layout) -> None:
    entries = ignore_list(decide(INT4, mtp=mtp))
    assert "re:^mtp.*" in entries and "mtp.fc" in entries
    for expert in range(6):
        for part in ("gate", "up", "down"):
            assert f"mtp.layers.0.mlp.experts.{expert}.{part}_proj" in entries
    for plain in (
        "self_attn.q_proj",
        "self_attn.o_proj",
        "mlp.shared_expert.down_proj",
        "mlp.gate",
        "mlp.shared_expert_gate",
    ):
        assert f"mtp.layers.0.{plain}" in entries
    for stack in ("self_attn.qkv_proj", "mlp.shared_expert.gate_up_proj"):
        assert f"mtp.layers.0.{stack}" in entries


@pytest.mark.parametrize("mtp", ["per-expert", "fused"])
@pytest.mark.parametrize("naming", ["vl", "text"])
def test_the_fp8_list_holds_exact_names_only(naming: Naming, mtp: Layout) -> None:
    decisions = decide(routed_experts(FP8_BLOCK, "fp8-block"), naming=naming, mtp=mtp, group=128)
    config = quantization_config(decisions)
    listed = config["modules_to_not_convert"]
    prefix = "model.language_model." if naming == "vl" else "model."
    assert not [entry for entry in listed if entry.startswith("re:") or "*" in entry] and len(set(listed)) == len(
        listed
    )
    expected = {name for decision in decisions if decision.scheme is None for name in expand(decision)}
    assert expected <= set(listed)
    for name in ("layers.0.linear_attn.in_proj_a", "layers.2.linear_attn.in_proj_b", "layers.1.self_attn.q_proj"):
        assert prefix + name in listed
    if naming == "vl":
        assert {"model.visual.merger.linear_fc1", "model.visual.blocks.0.attn.qkv"} <= set(listed)
    # vLLM leaves a layer's experts alone when their common name is inside an entry that holds "experts".
    for decision in decisions:
        if decision.scheme is not None:
            experts = vllm_name(decision.name).rsplit(".", 2)[0]
            assert not any(experts in vllm_name(entry) for entry in listed if "experts" in entry)
    assert any("mtp.layers.0.mlp.experts" in entry for entry in listed)


def test_patterns_stop_where_a_kind_is_quantized_somewhere() -> None:
    def choose(module: str) -> tuple[Scheme, str] | None:
        one_layer = module.startswith("model.language_model.layers.1.self_attn.")
        return (int4(32), "pack-quantized") if one_layer or INT4(module) else None

    decisions = [replace(d, shape=(64, 64)) for d in decide(choose)]
    entries = ignore_list(decisions)
    assert not any("self_attn" in entry for entry in entries if entry.startswith("re:"))
    assert "mtp.layers.0.self_attn.q_proj" in entries and r"re:.*\.linear_attn\.out_proj$" in entries


def test_mtp_that_is_quantized_is_not_ignored() -> None:
    def choose(module: str) -> tuple[Scheme, str] | None:
        return (int4(32), "pack-quantized") if ".mlp.experts." in module else None

    entries = ignore_list(decide(choose))
    assert "re:^mtp.*" not in entries and not ignored("mtp.layers.0.mlp.experts.0.gate_proj", entries)
    assert ignored("mtp.layers.0.self_attn.q_proj", entries) and "mtp.fc" in entries


def test_compressed_tensors_understands_the_block_and_leaves_the_same_modules_alone() -> None:
    linear = torch.nn.Linear(2, 2)
    for scheme, name in ((int4(32), "pack-quantized"), (INT8, "pack-quantized"), (FP8, "float-quantized")):
        decisions = decide(routed_experts(scheme, name))
        config = QuantizationConfig.model_validate(quantization_config(decisions))
        group = config.config_groups["group_0"]
        assert config.format == group.format == name and config.quantization_status.value == "compressed"
        assert (group.input_activations is None) == (scheme.activation.kind == "none")
        assert group.weights.strategy == ("group" if scheme == int4(32) else "channel")
        for decision in decisions:
            if not decision.stacked:
                chosen = is_match(decision.name, linear, group.targets, config.ignore)
                assert chosen == (decision.scheme is not None), decision.name


def mixed(module: str) -> tuple[Scheme, str] | None:
    if INT4(module):
        return INT4(module)
    attention = ".self_attn." in module or module.endswith((".in_proj_qkv", ".in_proj_z", ".out_proj"))
    if (attention or ".shared_expert." in module) and not module.startswith("mtp."):
        return INT8, "pack-quantized"
    return None


def test_mixed_groups_each_have_their_own_targets() -> None:
    linear = torch.nn.Linear(2, 2)
    decisions = decide(mixed)
    config = quantization_config(decisions)
    assert config["format"] == "mixed-precision" and list(config["config_groups"]) == ["group_0", "group_1"]
    experts, dense = config["config_groups"].values()
    assert experts["weights"]["num_bits"] == 4 and "experts" in experts["targets"][0]
    # names instead of patterns would be tens of thousands in a large checkpoint
    assert len(experts["targets"]) == 1 and all(target.startswith("re:") for target in dense["targets"])
    for decision in decisions:
        if decision.stacked:
            continue
        for name in {decision.name, vllm_name(decision.name)}:
            bits = {4: experts, 8: dense}
            hits = [n for n, group in bits.items() if is_match(name, linear, group["targets"], config["ignore"])]
            assert hits == ([] if decision.scheme is None else [decision.scheme.weight_bits]), name


def change(decisions: list[ModuleDecision], pattern: str, **fields: object) -> list[ModuleDecision]:
    changed = [replace(d, **fields) if re.search(pattern, d.name) else d for d in decisions]
    assert changed != decisions
    return changed


INT8_FIELDS: Fields = {"scheme": INT8, "format": "pack-quantized"}
TILES: Fields = {"scheme": FP8_BLOCK, "format": "fp8-block", "shape": (256, 128)}
KEPT: Fields = {"scheme": None, "format": None}
L1 = r"language_model\.layers\.1\."
FAULTS: list[tuple[str, Fields, str]] = [
    (L1 + "self_attn.k_proj", INT8_FIELDS, r"q_proj \(kept\) and .*k_proj \(int8-channel-sym\) differ: .*qkv_proj"),
    (L1 + "mlp.shared_expert.up_proj", INT8_FIELDS, r"shared_expert.gate_proj .* differ: .*gate_up_proj"),
    (r"layers\.0\.linear_attn.in_proj_z", INT8_FIELDS, r"in_proj_qkv \(kept\) and .*in_proj_z .*in_proj_qkvz"),
    (r"layers\.0\.linear_attn.in_proj_a", INT8_FIELDS, r"in_proj_b \(kept\) and .*in_proj_a .*in_proj_ba"),
    (L1 + r"mlp\.experts\.3\.down_proj", INT8_FIELDS, r"experts.0.gate_proj .*experts.3.down_proj .*expert 0's"),
    (L1 + r"mlp\.experts\.3\.up_proj", KEPT, r"experts.3.gate_proj .*experts.3.up_proj \(kept\) differ: .*gate_up"),
    (L1 + r"mlp\.experts\.", INT8_FIELDS, "transformers reads one scheme for the experts of all layers"),
    (L1 + r"mlp\.gate$", INT8_FIELDS, r"mlp.gate cannot be quantized to int8-channel-sym: the router"),
    (L1 + r"mlp\.shared_expert_gate$", INT8_FIELDS, "shared_expert_gate cannot be quantized"),
    (r"visual\.merger\.linear_fc1", INT8_FIELDS, "visual.merger.linear_fc1 cannot be quantized"),
    (r"mtp\.fc", INT8_FIELDS, "mtp.fc cannot be quantized"),
    (L1 + r"mlp\.experts\.", {"shape": (80, 64)}, "divisible by the group, which is 32"),
    (
        L1 + r"self_attn\.(q|k|v)_proj",
        {"scheme": FP8_BLOCK, "format": "fp8-block", "shape": (256, 128)},
        "one quant_method",
    ),
    (L1 + r"self_attn\.o_proj", {"scheme": INT8}, "no format is named"),
    (L1 + r"self_attn\.o_proj", {"scheme": INT8, "format": "pack-quantized", "stacked": 4}, "stacks experts"),
]


@pytest.mark.parametrize(("pattern", "fields", "message"), FAULTS, ids=[message for _, _, message in FAULTS])
def test_what_engines_would_refuse_or_misread_is_an_error(
    pattern: str, fields: dict[str, object], message: str
) -> None:
    good = decide(INT4)
    verify(good)
    with pytest.raises(PlanError, match=message):
        verify(change(good, pattern, **fields))


def test_each_layer_s_experts_have_a_pattern_of_their_own_where_vllm_alone_reads_them() -> None:
    linear = torch.nn.Linear(2, 2)
    decisions = change(decide(INT4), L1 + r"mlp\.experts\.", **INT8_FIELDS)
    with pytest.raises(PlanError, match="transformers reads one scheme"):
        quantization_config(decisions)
    config = quantization_config(decisions, "vllm")
    targets = {group["weights"]["num_bits"]: group["targets"] for group in config["config_groups"].values()}
    assert {len(listed) for listed in targets.values()} == {1, 2}
    for decision in decisions:
        for name in {decision.name, vllm_name(decision.name)} if not decision.stacked else ():
            hits = [bits for bits, listed in targets.items() if is_match(name, linear, listed, config["ignore"])]
            assert hits == ([] if decision.scheme is None else [decision.scheme.weight_bits]), name
    wrong = change(decisions, L1 + r"mlp\.experts\.3\.down_proj", scheme=int4(32))
    with pytest.raises(PlanError, match="expert 0's"):
        verify(wrong, "vllm")


def test_a_format_s_refusal_names_the_module() -> None:
    with pytest.raises(FormatError, match=r"layers.0.mlp.experts.0.gate_proj: groups of 128 do not divide the 96"):
        verify(decide(routed_experts(int4(128), "pack-quantized")))


def test_one_scheme_for_all_of_fp8_and_something_to_quantize() -> None:
    good = decide(routed_experts(FP8_BLOCK, "fp8-block"), group=128)
    other = replace(FP8_BLOCK, scale=replace(FP8_BLOCK.scale, dtype=type(FP8_BLOCK.scale.dtype).F32))
    mixed_fp8 = change(good, r"self_attn\.o_proj", scheme=other, format="fp8-block", shape=(128, 128))
    with pytest.raises(PlanError, match="one scheme for the whole checkpoint"):
        quantization_config(mixed_fp8)
    with pytest.raises(PlanError, match="nothing is quantized"):
        quantization_config(decide(lambda module: None))


def test_stacked_experts_are_listed_one_by_one() -> None:
    fused = ModuleDecision(name="mtp.layers.0.mlp.experts.gate_up_proj", shape=(8, 4), stacked=2)
    assert exact_names([fused]) == [
        f"mtp.layers.0.mlp.experts.{expert}.{part}_proj" for expert in (0, 1) for part in ("gate", "up")
    ]


def test_the_tiny_checkpoint_has_every_linear_kind() -> None:
    names = {name for name, tensor in tiny_tensors(tiny_config()).items() if is_linear(name, tensor)}
    assert {part for _, parts in STACKED for part in parts} <= {name.split(".")[-2] for name in names}
