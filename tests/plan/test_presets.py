"""Presets decide just the matrices that they name, and give checkpoints that engines' rules accept."""

from __future__ import annotations

from pathlib import Path

import pytest

from qconvert.convert import plan_conversion
from qconvert.core.errors import PlanError, UsageError
from qconvert.core.plan import Quantize
from qconvert.core.role import Kind, Section, TensorRole
from qconvert.core.scheme import FP8, FP8_BLOCK, INT8, MXFP4, W8A8, Scheme, int4
from qconvert.plan.policy import Rule, default_policy
from qconvert.plan.presets import PRESET_NAMES, preset_rules
from tests.checkpoints import make_tiny

ALWAYS_ACTIVE = {
    "text.attention.query", "text.attention.key", "text.attention.value", "text.attention.output",
    "text.linear_attention.qkv", "text.linear_attention.z", "text.linear_attention.output",
    "text.shared_expert.gate", "text.shared_expert.up", "text.shared_expert.down",
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("presets") / "src"
    make_tiny(folder, group=128)
    return folder


def schemes(source: Path, preset: str, scheme: Scheme) -> dict[str, set[Scheme | None]]:
    plan = plan_conversion(source, default_policy(scheme, rules=preset_rules(preset, scheme)))
    found: dict[str, set[Scheme | None]] = {}
    for step in plan.steps:
        chosen = step.action.scheme if isinstance(step.action, Quantize) else None
        found.setdefault(step.role.path, set()).add(chosen)
    return found


@pytest.mark.parametrize("scheme", [int4(32), INT8, W8A8, FP8, MXFP4], ids=str)
def test_mixed_puts_what_is_always_active_into_eight_bits(source: Path, scheme: Scheme) -> None:
    wide = scheme if scheme.weight_bits == 8 else INT8
    for path, chosen in schemes(source, "mixed", scheme).items():
        expected = scheme if path.startswith("text.expert.") else wide if path in ALWAYS_ACTIVE else None
        assert chosen == {expected}, path


@pytest.mark.parametrize("scheme", [int4(32), INT8, W8A8, FP8, FP8_BLOCK, MXFP4], ids=str)
def test_fusable_gives_the_shared_expert_the_scheme_of_the_routed_ones(source: Path, scheme: Scheme) -> None:
    for path, chosen in schemes(source, "fusable", scheme).items():
        expert = path.startswith(("text.expert.", "text.shared_expert."))
        assert chosen == {scheme if expert else None}, path


def test_rules_of_the_user_go_first() -> None:
    own = Rule(match="text.attention.*", scheme=FP8, reason="mine")
    policy = default_policy(int4(32), rules=(own, *preset_rules("mixed", int4(32))))
    query = TensorRole(section=Section.TEXT, kind=Kind.ATTENTION_QUERY, layer=0)
    output = TensorRole(section=Section.TEXT, kind=Kind.LINEAR_OUTPUT, layer=0)
    assert policy.decide(query).scheme == FP8
    assert policy.decide(output).scheme == INT8


def test_what_engines_cannot_read_together_is_refused(source: Path) -> None:
    rules = preset_rules("mixed", int4(32))
    with pytest.raises(PlanError, match="one quant_method"):
        plan_conversion(source, default_policy(FP8_BLOCK, rules=rules))


def test_an_unknown_preset_lists_the_known() -> None:
    with pytest.raises(UsageError, match="preset 'small' is unknown; expected one of fusable, mixed"):
        preset_rules("small", INT8)
    assert PRESET_NAMES == ("fusable", "mixed")
