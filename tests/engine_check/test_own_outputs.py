"""What we write breaks no rule of any engine; an entry less in a list of ours does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qconvert.cli.demo import CHECKPOINT
from qconvert.core.scheme import FP8, FP8_BLOCK, INT8, MXFP4, NVFP4, W8A8, Scheme, int4
from qconvert.engine_check.readers import TransformersCompressedTensors, in_vllm
from qconvert.engine_check.rule import Engine
from qconvert.formats.engine_rules import STACKED, expert_block, vllm_name
from qconvert.plan.policy import Rule, default_policy
from qconvert.plan.presets import PRESET_NAMES, preset_rules
from tests.checkpoints import Layout, Naming, make_tiny
from tests.engine_check.planned import Headers
from tests.engines.test_vllm import POLICIES

SCHEMES: dict[str, Scheme] = {str(s): s for s in (int4(32), int4(128), INT8, W8A8, FP8, FP8_BLOCK, MXFP4, NVFP4)}
STACKS = tuple(stack for stack, _ in STACKED)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Layout, Naming], Path]:
    root = tmp_path_factory.mktemp("sources")
    layouts: tuple[Layout, ...] = ("fused", "per-expert")
    namings: tuple[Naming, ...] = ("vl", "text")
    made = {(layout, naming): root / f"{layout}-{naming}" for layout in layouts for naming in namings}
    for (layout, naming), path in made.items():
        make_tiny(path, layout=layout, naming=naming, group=128)
    return made


def unannounced(headers: Headers) -> list[str]:
    return [f"{one.rule.id}: {one.detail}: {one.modules}" for one in headers.found() if not one.rule.announced]


@pytest.mark.parametrize("name", POLICIES)
def test_what_vllm_s_tests_load_breaks_no_rule(name: str) -> None:
    assert unannounced(Headers.of(CHECKPOINT, POLICIES[name][0])) == []


@pytest.mark.parametrize("naming", ["vl", "text"])
@pytest.mark.parametrize("layout", ["fused", "per-expert"])
@pytest.mark.parametrize("preset", [None, *PRESET_NAMES])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_and_preset_breaks_no_rule(
    sources: dict[tuple[Layout, Naming], Path], scheme: str, preset: str | None, layout: Layout, naming: Naming
) -> None:
    rules = preset_rules(preset, SCHEMES[scheme]) if preset else ()
    if preset == "mixed" and SCHEMES[scheme] == FP8_BLOCK:
        return  # two quant_methods in one checkpoint: refused before
    assert unannounced(Headers.of(sources[layout, naming], default_policy(SCHEMES[scheme], rules=rules))) == []


@pytest.mark.parametrize("method", [None, "gptq"])
@pytest.mark.parametrize("match", ["text.shared_expert.*", "text.attention.*"])
def test_a_stack_that_is_quantized_in_some_layers_only_is_not_kept_by_a_pattern(
    tmp_path: Path, match: str, method: str | None
) -> None:
    make_tiny(tmp_path / "src", layers=6)
    norms = Rule(match="text.attention.*_norm", scheme=None, reason="a vector")
    rule = Rule(match=match, scheme=int4(32), reason="some layers", layers=frozenset({1, 2}))
    policy = default_policy(int4(32), rules=(norms, rule))
    assert unannounced(Headers.of(tmp_path / "src", policy.stored_as(method) if method else policy)) == []


def modules_of(name: str) -> set[str]:
    """What engines make of a module: itself, its stack, its block of experts."""
    stem, _, part = name.rpartition(".")
    return {name, expert_block(name), *(f"{stem}.{stack}" for stack, parts in STACKED if part in parts)}


def speaks_of(entry: str, names: set[str]) -> bool:
    if entry.startswith("re:"):
        return any(re.match(entry[3:], one) for name in names for one in (name, vllm_name(name)))
    return entry in names or expert_block(entry) in names


def is_asked_for(name: str) -> bool:
    """Whether engines look it up: a stack's name is said beside its parts, gates are dense by nature."""
    return not name.startswith("re:") and not name.endswith((*STACKS, ".mlp.gate", ".shared_expert_gate", "lm_head"))


def caught(headers: Headers, name: str, engine: Engine) -> bool:
    return any(modules_of(name) & set(one.modules) for one in headers.found(engine))


@pytest.mark.parametrize("naming", ["vl", "text"])
@pytest.mark.parametrize(("scheme", "field"), [(FP8_BLOCK, "modules_to_not_convert"), (int4(32), "ignore")])
def test_a_module_that_a_list_of_ours_no_longer_speaks_of_is_caught(
    sources: dict[tuple[Layout, Naming], Path], scheme: Scheme, field: str, naming: Naming
) -> None:
    headers = Headers.of(sources["per-expert", naming], default_policy(scheme))
    listed = headers.quantization[field]
    for name in filter(is_asked_for, listed):
        names = modules_of(name)
        shorter = headers.declaring(**{field: [entry for entry in listed if not speaks_of(entry, names)]})
        assert caught(shorter, name, Engine.VLLM), name
        # SGLang's fp8 list matches the end of a name too: a text-only layer 0 speaks of the draft head's layer 0
        if naming == "vl" and not name.startswith("model.visual.") and name != "mtp.fc":
            assert caught(shorter, name, Engine.SGLANG), name


@pytest.mark.parametrize("naming", ["vl", "text"])
def test_of_a_list_that_says_nothing_twice_every_entry_is_needed(
    sources: dict[tuple[Layout, Naming], Path], naming: Naming
) -> None:
    headers = Headers.of(sources["fused", naming], default_policy(FP8_BLOCK))
    listed = [
        entry
        for entry in filter(is_asked_for, headers.quantization["modules_to_not_convert"])
        if ".experts." not in entry or ".experts.0.gate_proj" in entry
    ]
    assert headers.declaring(modules_to_not_convert=listed).found(Engine.VLLM) == []
    for name in listed:
        shorter = headers.declaring(modules_to_not_convert=[entry for entry in listed if entry != name])
        assert caught(shorter, name, Engine.VLLM), name


@pytest.mark.parametrize("entry", ["mtp.", "visual.", ".self_attn.o_proj", ".mlp.shared_expert.down_proj"])
def test_every_part_in_awq_s_list_is_needed(sources: dict[tuple[Layout, Naming], Path], entry: str) -> None:
    headers = Headers.of(sources["per-expert", "vl"], default_policy(int4(32)).stored_as("awq"))
    listed = headers.quantization["modules_to_not_convert"]
    assert entry in listed and headers.found(Engine.VLLM) == []
    shorter = headers.declaring(modules_to_not_convert=[other for other in listed if other != entry])
    assert {one.rule.id for one in shorter.found(Engine.VLLM)} == {"vllm-awq-list"}


def test_transformers_reader_matches_like_compressed_tensors(sources: dict[tuple[Layout, Naming], Path]) -> None:
    from compressed_tensors.utils.match import is_match
    from torch.nn import Linear

    rules = preset_rules("mixed", int4(32))
    headers = Headers.of(sources["per-expert", "vl"], default_policy(int4(32), rules=rules))
    block = headers.quantization
    reader = TransformersCompressedTensors(block)
    targets = [target for group in block["config_groups"].values() for target in group["targets"]]
    module = Linear(1, 1)
    for info in headers.tensors:
        name = info.name.rpartition(".")[0]
        assert reader.reads(name) is is_match(name, module, targets, block["ignore"]), name


def test_names_of_text_only_checkpoints_stay() -> None:
    assert in_vllm("lm_head", mapped=False) == "lm_head"
    assert in_vllm("model.visual.merger.linear_fc1", mapped=True) == "visual.merger.linear_fc1"
