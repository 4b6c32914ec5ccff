from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qconvert.arch.shapes import expected_roles
from qconvert.core.errors import FormatError, PlanError, UsageError
from qconvert.core.role import EXPERT_KINDS, Kind, Section, TensorRole
from qconvert.core.scheme import FP8_BLOCK, INT8, int4
from qconvert.formats.table import METHODS
from qconvert.plan.policy import SCHEME_NAMES, Policy, Rule, default_policy, read_rules, scheme_named
from reference_model.config import ModelConfig
from tests.checkpoints import tiny_config


def role(kind: Kind, layer: int = 0, section: Section = Section.TEXT) -> TensorRole:
    return TensorRole(section=section, kind=kind, layer=layer)


def write(path: Path, text: str) -> Path:
    file = path / "policy.toml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("stacked", [True, False])
def test_by_default_only_routed_experts_of_the_decoder_are_rounded(stacked: bool) -> None:
    config = ModelConfig.from_dict(tiny_config())
    policy = default_policy(int4())
    for one in expected_roles(config, stacked=stacked):
        rule = policy.decide(one)
        assert (rule.scheme is not None) == (one.section is Section.TEXT and one.kind in EXPERT_KINDS), one
        assert rule.reason


def test_a_role_that_no_rule_decides_is_an_error() -> None:
    with pytest.raises(PlanError, match=r"text\.norm"):
        Policy(rules=()).decide(role(Kind.NORM))


def test_the_first_rule_that_matches_decides(tmp_path: Path) -> None:
    rules = read_rules(
        write(
            tmp_path,
            """
            [[rule]]
            match = "text.expert.*"
            layers = "0-1,3"
            keep = true
            reason = "first layers"
            [[rule]]
            match = "text.attention.*"
            scheme = "int8"
            """,
        )
    )
    policy = default_policy(int4(32), rules=rules)
    kept = [layer for layer in range(5) if policy.decide(role(Kind.EXPERT_DOWN, layer)).scheme is None]
    assert kept == [0, 1, 3]
    assert policy.decide(role(Kind.EXPERT_DOWN)).reason == "first layers"
    assert policy.decide(role(Kind.ATTENTION_KEY)).scheme == INT8
    assert policy.decide(role(Kind.LINEAR_Z)).scheme is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rule = 3", "[[rule]]"),
        ("[[rule]]\nmatch = 'a'", "either 'scheme' or 'keep = true'"),
        ("[[rule]]\nkeep = true", "no 'match'"),
        ("[[rule]]\nmatch = 'a'\nscheme = 'int3'", "int4, int8, w8a8, fp8, fp8-block, mxfp4"),
        ("[[rule]]\nmatch = 'a'\nscheme = 'int8'\ngroup = 32", "no groups"),
        ("[[rule]]\nmatch = 'a'\nscheme = 'int4'\ngroup = 33", "32, 64 or 128"),
        ("[[rule]]\nmatch = 'a'\nkeep = true\nlayers = '1-'", "0-3,39"),
        ("[[rule]]\nmatch = 'a'\nkeep = true\nlayer = 1", "unknown key 'layer'"),
        ("[[rule]]\nmatch = 'a'\nkeep = 1", "expected bool"),
        ("[[rule]]\nmatch = 'a'\nkeep = true\nsearch = true", "takes no"),
        ("[[rule]]\nmatch = 'a'\nkeep = true\nengine = 'vllm'", "takes no"),
        ("[[rule]]\nmatch = 'a'\nscheme = 'int8'\nengine = 'sglang'", "expected vllm"),
        ("[[rule]]\nmatch = 'a'\nkeep = true\nlayers = '3-1'", "'3-1' is no range"),
        ("[[rule]]\nmatch = 'a'\nkeep = true\nlayers = '0-99999999'", "no range"),
        ("[[rule", "not TOML"),
    ],
)
def test_a_malformed_policy_is_one_error_that_names_the_rule(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        read_rules(write(tmp_path, text))
    assert said in str(raised.value)
    assert "policy.toml" in str(raised.value)


def test_the_hash_changes_with_every_rule() -> None:
    policies = [default_policy(scheme_named(name)) for name in SCHEME_NAMES]
    own = Rule(match="text.expert.*", scheme=int4(), reason="mine", default=True)
    policies += [default_policy(int4(), rules=(own,)), default_policy(int4(), rules=(replace(own, engine="vllm"),))]
    policies += [default_policy(int4(32)), default_policy(int4(symmetric=False)), default_policy(int4(), search=True)]
    assert len({policy.hash for policy in policies}) == len(policies)


LOADERS: dict[str, set[str]] = {
    "int4": {"compressed-tensors", "gptq", "awq"},
    "int8": {"compressed-tensors", "gptq"},
    "fp8-block": {"compressed-tensors", "fp8"},
    **{name: {"compressed-tensors"} for name in ("w8a8", "fp8", "mxfp4", "nvfp4")},
    **{name: {"bitsandbytes"} for name in ("nf4", "fp4", "llm-int8")},
}


def test_search_of_the_command_is_for_rules_that_have_scales_to_choose(tmp_path: Path) -> None:
    text = (
        "[[rule]]\nmatch = 'text.shared_expert.*'\nscheme = 'nf4'\n[[rule]]\nmatch = 'text.expert.*'\nscheme = 'int4'\n"
    )
    rules = read_rules(write(tmp_path, text), search=True)
    assert [rule.search for rule in rules] == [False, True]
    policy = Policy(rules=rules)
    assert Policy.of_entries(policy.entries(), "manifest.json").hash == policy.hash


@pytest.mark.parametrize("method", [None, *METHODS])
@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_what_a_manifest_says_of_a_policy_is_the_policy(name: str, method: str | None) -> None:
    policy = default_policy(scheme_named(name))
    if method is not None:
        if method not in LOADERS[name]:
            with pytest.raises(FormatError, match=f"no format of {method} holds"):
                policy.stored_as(method)
            return
        policy = policy.stored_as(method)
    again = Policy.of_entries(policy.entries(), "manifest.json")
    assert again.hash == policy.hash


def test_a_loader_that_is_unknown_or_does_not_read_the_scheme_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="format 'gguf' is unknown; expected one of compressed-tensors, fp8, gptq"):
        default_policy(int4(32)).stored_as("gguf")
    file = tmp_path / "policy.toml"
    file.write_text("[[rule]]\nmatch = 'text.expert.*'\nscheme = 'fp8'\nformat = 'gptq'\n")
    with pytest.raises(UsageError, match="rule 1: no format of gptq holds fp8-channel"):
        read_rules(file)


def test_a_rule_that_names_its_loader_keeps_it() -> None:
    own = Rule(match="text.attention.*", scheme=FP8_BLOCK, reason="mine", method="fp8")
    policy = default_policy(FP8_BLOCK, rules=(own,)).stored_as("compressed-tensors")
    assert [rule.method for rule in policy.rules[:2]] == ["fp8", "compressed-tensors"]


@pytest.mark.parametrize("name", ["nf4", "fp4", "llm-int8"])
def test_bitsandbytes_keeps_experts_and_ruins_no_output_gate(name: str) -> None:
    policy = default_policy(scheme_named(name))
    assert policy.decide(role(Kind.EXPERT_GATE)).scheme is None
    assert policy.decide(role(Kind.LINEAR_OUTPUT)).scheme == scheme_named(name)
    assert (policy.decide(role(Kind.ATTENTION_QUERY)).scheme is None) == (name != "llm-int8")
    with pytest.raises(UsageError, match="drop the search"):
        default_policy(scheme_named(name), search=True)
