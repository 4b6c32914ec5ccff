"""Every rule catches a checkpoint that breaks just it, and says so in the right words."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qconvert.convert import convert
from qconvert.core.scheme import FP8, FP8_BLOCK, LLM_INT8, MXFP4, NVFP4, W8A8, Scheme, bnb4, int4
from qconvert.engine_check.rule import Effect, Engine
from qconvert.engine_check.run import RULES, check_checkpoint, describe
from qconvert.plan.policy import Policy, Rule, default_policy
from qconvert.plan.presets import preset_rules
from tests.checkpoints import make_tiny, save_checkpoint, tiny_config, tiny_tensors
from tests.edits import edit_quantization, edit_tensors, quantization_of
from tests.engine_check.test_transformers_is_silent import stack_experts
from tests.formats.whole_model import routed_experts, write_quantized

TEXT = "model.language_model."


def everywhere(scheme: Scheme) -> Policy:
    matches = ("text.shared_expert.*", "text.attention.*", "text.linear_attention.output")
    rules = tuple(Rule(match=match, scheme=scheme, reason="to break it") for match in matches)
    norms = tuple(
        Rule(match=f"text.attention.{side}_norm", scheme=None, reason="a vector") for side in ("query", "key")
    )
    return default_policy(scheme, rules=(*norms, *rules))


BASES: dict[str, Policy] = {
    "int4": default_policy(int4(32)),
    "int4-g128": default_policy(int4(128)),
    "int4-asym": default_policy(int4(32, symmetric=False)),
    "int4-everywhere": everywhere(int4(32)),
    "fusable": default_policy(int4(32), rules=preset_rules("fusable", int4(32))),
    "fp8-block": default_policy(FP8_BLOCK),
    "fp8-tiles": default_policy(FP8_BLOCK).stored_as("compressed-tensors"),
    "gptq": default_policy(int4(32)).stored_as("gptq"),
    "awq": default_policy(int4(32)).stored_as("awq"),
    "awq singles": default_policy(
        int4(32),
        rules=(
            Rule(match="text.expert.*", scheme=None, reason="test"),
            Rule(match="text.linear_attention.output", scheme=int4(32), reason="test"),
        ),
    ).stored_as("awq"),
    "w8a8": default_policy(W8A8),
    "fp8 shared": default_policy(FP8, rules=preset_rules("fusable", FP8)),
    "mxfp4": default_policy(MXFP4),
    "nvfp4": default_policy(NVFP4),
    "nf4": default_policy(bnb4("nf4")),
    "llm-int8": default_policy(LLM_INT8),
}


def without(field: str, *parts: str) -> Callable[[Path], None]:
    """Take everything that speaks of one of ``parts`` out of a list."""

    def damage(path: Path) -> None:
        entries: Any = quantization_of(path)[field]
        kept = [entry for entry in entries if not any(part in entry for part in parts)]
        edit_quantization(path, **{field: kept if isinstance(entries, list) else {name: {} for name in kept}})

    return damage


def no_stacks_of_mtp(path: Path) -> None:
    kept = [e for e in quantization_of(path)["ignore"] if e != "re:^mtp.*" and not e.startswith("re:.*\\.self_attn")]
    stacks = ("mtp.layers.0.self_attn.qkv_proj",)
    edit_quantization(path, ignore=[entry for entry in kept if entry not in stacks])


def dense(name: str, *parts: str) -> Callable[[Path], None]:
    """Store a quantized matrix plainly; [N, K] does not matter to headers' rules but to completeness."""

    def change(tensors: dict[str, Tensor]) -> None:
        rows, cols = tensors[f"{name}.weight_shape"].tolist()
        for part in ("weight_packed", "weight_scale", "weight_shape"):
            del tensors[f"{name}.{part}"]
        tensors[f"{name}.weight"] = torch.zeros(rows, cols, dtype=torch.bfloat16)

    def damage(path: Path) -> None:
        edit_tensors(path, change)
        edit_quantization(path, ignore=[*quantization_of(path)["ignore"], name, *parts])

    return damage


def quantized_router(path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{TEXT}layers.0.mlp.gate.weight"]
        tensors[f"{TEXT}layers.0.mlp.gate.weight_packed"] = torch.zeros(16, 48, dtype=torch.int32)
        tensors[f"{TEXT}layers.0.mlp.gate.weight_scale"] = torch.zeros(16, 12, dtype=torch.bfloat16)

    edit_tensors(path, change)


def reordered(path: Path) -> None:
    """Groups of inputs that are not consecutive: their indexes are stored beside."""
    groups = quantization_of(path)["config_groups"]
    groups["group_0"]["weights"]["actorder"] = "group"
    edit_quantization(path, config_groups=groups)

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".weight_packed")]:
            module = name.removesuffix(".weight_packed")
            cols = int(tensors[f"{module}.weight_shape"][1])
            tensors[f"{module}.weight_g_idx"] = torch.arange(cols, dtype=torch.int32) // 32

    edit_tensors(path, change)


def drop(name: str) -> Callable[[Path], None]:
    return lambda path: edit_tensors(path, lambda tensors: tensors.pop(name))


def add(name: str) -> Callable[[Path], None]:
    return lambda path: edit_tensors(path, lambda tensors: tensors.update({f"{TEXT}{name}": torch.ones(4)}))


def shorten(name: str) -> Callable[[Path], None]:
    return lambda path: edit_tensors(path, lambda tensors: tensors.update({name: tensors[name][:-1]}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    rule: str
    base: str
    damage: Callable[[Path], None] = lambda path: None
    says: str
    module: str
    tp: int = 1


UP = f"{TEXT}layers.0.mlp.experts.3.up_proj"
K = f"{TEXT}layers.1.self_attn.k_proj"
A = f"{TEXT}layers.0.linear_attn.in_proj_a"
EXPERTS = f"{TEXT}layers.0.mlp.experts"
PLAIN = "stored plain, but the list does not keep it"
CASES = (
    *(
        case
        for engine in ("vllm", "transformers", "sglang")
        for case in (
            Case(rule=f"{engine}-missing", base="int4", damage=drop(f"{TEXT}norm.weight"), says="is missing",
                 module=f"{TEXT}norm.weight"),
            Case(rule=f"{engine}-unknown", base="int4", damage=add("inv_freq"), says="is no tensor of this",
                 module=f"{TEXT}inv_freq"),
            Case(rule=f"{engine}-misshapen", base="int4", damage=shorten(f"{UP}.weight_scale"), says="weight_scale is",
                 module=UP),
        )
    ),
    *(
        Case(rule=f"{engine}-folded", base="folded", says="6 more hold the shared expert",
             module="config.json qconvert.folded_shared_expert")
        for engine in ("vllm", "transformers", "sglang")
    ),
    Case(rule="vllm-ignore", base="int4", damage=without("ignore", "visual"), says=PLAIN,
         module="model.visual.blocks.0.attn.qkv"),
    Case(rule="transformers-ignore", base="int4", damage=without("ignore", "o_proj"), says=PLAIN,
         module=f"{TEXT}layers.1.self_attn.o_proj"),
    Case(rule="sglang-ignore", base="int4", damage=no_stacks_of_mtp, says=PLAIN,
         module="mtp.layers.0.self_attn.qkv_proj"),
    Case(rule="vllm-fp8-list", base="fp8-block", damage=without("modules_to_not_convert", A), says="some of its parts",
         module=f"{TEXT}layers.0.linear_attn.in_proj_ba"),
    Case(rule="transformers-fp8-list", base="fp8-block", damage=without("modules_to_not_convert", A), says=PLAIN,
         module=A),
    Case(rule="sglang-fp8-list", base="fp8-block", damage=without("modules_to_not_convert", A), says="some of its",
         module=f"{TEXT}layers.0.linear_attn.in_proj_ba"),
    Case(rule="vllm-gptq-dynamic", base="gptq", damage=without("dynamic", "mtp"), says=PLAIN,
         module="mtp.layers.0.mlp.experts"),
    Case(rule="vllm-awq-list", base="awq", damage=without("modules_to_not_convert", "mtp"), says=PLAIN,
         module="mtp.layers.0.mlp.experts"),
    *(
        Case(rule=f"{engine}-stacks", base="int4-everywhere", damage=dense(K), says=K,
             module=f"{TEXT}layers.1.self_attn.qkv_proj")
        for engine in ("vllm", "sglang")
    ),
    *(
        Case(rule=f"{engine}-expert-layer", base="int4", damage=dense(UP), says="in 2 ways", module=EXPERTS)
        for engine in ("vllm", "sglang")
    ),
    Case(rule="transformers-experts", base="int4 beside kept", says="kept one by one",
         module=f"{TEXT}layers.1.mlp.experts"),
    Case(rule="transformers-stacked-experts", base="fp8-block", damage=lambda path: edit_tensors(path, stack_experts),
         says="in one tensor", module=EXPERTS),
    *(
        Case(rule=f"{engine}-dense", base="int4", damage=quantized_router, says="stored quantized",
             module=f"{TEXT}layers.0.mlp.gate")
        for engine in ("vllm", "transformers", "sglang")
    ),
    Case(rule="vllm-gptq-arguments", base="gptq", damage=lambda path: edit_quantization(path, desc_act=True),
         says="desc_act", module="quantization_config"),
    Case(rule="vllm-activation-order", base="int4", damage=reordered, says="actorder is 'group'",
         module="config_groups.group_0"),
    Case(rule="vllm-tp-heads", base="int4", tp=4, says="10 is not divisible by 4",
         module="config.json num_attention_heads"),
    Case(rule="vllm-linear-groups", base="tiny fusable", tp=2, says="groups of 32 do not divide 16 inputs",
         module=f"{TEXT}layers.0.mlp.shared_expert.down_proj"),
    Case(rule="vllm-expert-groups", base="tiny wide", tp=2, says="groups of 32 do not divide the expert width 48",
         module=EXPERTS),
    Case(rule="transformers-zero-points", base="int4-asym", says="int4-g32-asym", module=EXPERTS),
    Case(rule="vllm-zero-points", base="int4-asym", says="int4-g32-asym", module=EXPERTS),
    Case(rule="transformers-w8a8-experts", base="w8a8", says="int-quantized", module=EXPERTS),
    Case(rule="transformers-fp8-tiles", base="fp8-tiles", says="float-quantized", module=EXPERTS),
    Case(rule="transformers-nvfp4-experts", base="nvfp4", says="nvfp4-pack-quantized", module=EXPERTS),
    Case(rule="transformers-token-scales", base="fp8 shared", says="float-quantized",
         module=f"{TEXT}layers.0.mlp.shared_expert.up_proj"),
    Case(rule="transformers-gptq", base="gptq", says="in gptq", module=EXPERTS),
    Case(rule="transformers-awq-experts", base="awq", says="in awq", module=EXPERTS),
    Case(rule="transformers-awq", base="awq singles", says="in awq", module=f"{TEXT}layers.0.linear_attn.out_proj"),
    Case(rule="transformers-nf4-rows", base="tiny nf4", says="bitsandbytes-nf4",
         module=f"{TEXT}layers.0.linear_attn.in_proj_qkv"),
    Case(rule="transformers-nf4-outputs", base="nf4 of other heads", says="bitsandbytes-nf4",
         module=f"{TEXT}layers.0.linear_attn.in_proj_qkv"),
    Case(rule="vllm-bitsandbytes", base="llm-int8", says="bitsandbytes", module=f"{TEXT}layers.0.linear_attn.out_proj"),
    Case(rule="vllm-mxfp4-activations", base="mxfp4", says="mxfp4-pack-quantized", module=EXPERTS),
)  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("bases")
    make_tiny(root / "source", group=128)

    def made(name: str) -> Path:
        path = root / name.replace(" ", "-")
        if not path.exists():
            if name == "int4 beside kept":
                choose = routed_experts(int4(32), "pack-quantized", layers=(0, 2))
                write_quantized(path, choose, naming="vl", group=32, stack_kept=False)
            elif name == "folded":
                convert(root / "source", path, BASES["fusable"], max_memory=4 << 30, fold=True)
            elif name == "tiny fusable":
                make_tiny(root / "tiny")
                convert(root / "tiny", path, BASES["fusable"], max_memory=4 << 30)
            elif name == "tiny nf4":
                make_tiny(root / "rows")
                convert(root / "rows", path, BASES["nf4"], max_memory=4 << 30)
            elif name == "nf4 of other heads":
                config = tiny_config(group=128) | {"dtype": "bfloat16"}
                config["text_config"]["linear_key_head_dim"] = 10
                tensors = {name: tensor.bfloat16() for name, tensor in tiny_tensors(config).items()}
                save_checkpoint(root / "outputs", config, tensors)
                convert(root / "outputs", path, BASES["nf4"], max_memory=4 << 30)
            elif name == "tiny wide":
                config = tiny_config() | {"dtype": "bfloat16"}
                config["text_config"]["moe_intermediate_size"] = 96
                tensors = {name: tensor.bfloat16() for name, tensor in tiny_tensors(config).items()}
                save_checkpoint(root / "wide", config, tensors)
                convert(root / "wide", path, BASES["int4"], max_memory=4 << 30)
            else:
                convert(root / "source", path, BASES[name], max_memory=4 << 30)
        return path

    return made


def test_every_rule_has_a_case_and_says_where_it_is_from() -> None:
    assert {case.rule for case in CASES} == {rule.id for rule in RULES}
    assert len({rule.id for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule.id.startswith(rule.engine.value) and rule.source and rule.happens and rule.remedy
        for file in [word.rstrip(";") for word in rule.source.split() if word.startswith("tests/")]:
            assert (Path(__file__).parents[2] / file).exists(), file
        assert (rule.proof.value == "run") == ("tests/" in rule.source)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.rule)
def test_a_rule_catches_what_breaks_just_it(case: Case, bases: Callable[[str], Path], tmp_path: Path) -> None:
    rule = next(rule for rule in RULES if rule.id == case.rule)
    path = shutil.copytree(bases(case.base), tmp_path / "out")
    before = {one.rule.id for one in check_checkpoint(path, [rule.engine]).found}
    assert before <= {case.rule}  # a format that an engine does not read is wrong from the start
    case.damage(path)
    result = check_checkpoint(path, [rule.engine], tp=case.tp)
    found = [one for one in result.found if one.rule is rule]
    assert {one.rule.id for one in result.found} == {case.rule}
    assert any(case.module in one.modules and case.says in one.detail for one in found), result.found
    assert bool(result.faults) is (rule.effect is not Effect.NOTE)
    line = describe(found[0])
    assert str(rule.engine) in line and rule.proof.value in line and rule.remedy in line


DRAFT = ("mtp.norm.weight", "mtp.layers.0.self_attn.o_proj.weight")


@pytest.mark.parametrize("engine", [Engine.VLLM, Engine.SGLANG])
def test_what_concerns_the_draft_head_alone_is_told_of_it(
    engine: Engine, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    path = shutil.copytree(bases("int4"), tmp_path / "out")
    for name in DRAFT:
        edit_tensors(path, lambda tensors, name=name: tensors.pop(name))
    without("ignore", "mtp")(path)
    found = check_checkpoint(path, [engine])
    effects = {one.rule.id: one.effect for one in found.found}
    assert effects.pop(f"{engine.value}-missing") is Effect.DRAFT_WRONG
    assert effects.pop(f"{engine.value}-ignore") is (
        Effect.DRAFT_FAILS if engine is Engine.VLLM else Effect.DRAFT_WRONG
    )
    assert not effects and found.faults == found.found


def test_a_gap_of_the_model_is_told_apart_from_one_of_its_draft_head(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    path = shutil.copytree(bases("int4"), tmp_path / "out")
    for name in (f"{TEXT}norm.weight", *DRAFT):
        edit_tensors(path, lambda tensors, name=name: tensors.pop(name))
    modules = {one.effect: set(one.modules) for one in check_checkpoint(path, [Engine.VLLM]).found}
    assert modules == {Effect.WRONG: {f"{TEXT}norm.weight"}, Effect.DRAFT_WRONG: set(DRAFT)}
