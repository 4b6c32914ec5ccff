"""The query and the output gate of ``q_proj`` are decided apart; the stored matrix has one scheme, the wider one."""

from __future__ import annotations

from pathlib import Path

import pytest

from qconvert.convert import plan_conversion
from qconvert.core.errors import PlanError
from qconvert.core.plan import Quantize
from qconvert.core.role import Kind, Part, Section, TensorRole
from qconvert.core.scheme import FP8, INT8, MXFP4, NVFP4, Scheme, bnb4, int4
from qconvert.plan.halves import decide
from qconvert.plan.policy import Policy, Rule, default_policy
from tests.checkpoints import make_tiny

Q_PROJ = TensorRole(section=Section.TEXT, kind=Kind.ATTENTION_QUERY, layer=1)
QUERY = "text.attention.query.query"
GATE = "text.attention.query.output_gate"
WHOLE = "text.attention.query"


def rule(match: str, scheme: Scheme | None) -> Rule:
    return Rule(match=match, scheme=scheme, reason=f"of {match}")


def decided(*rules: Rule) -> Rule:
    return decide(Policy(rules=rules), Q_PROJ, "q_proj")[0]


def test_the_halves_are_roles_with_paths_of_their_own() -> None:
    assert [half.path for half in Q_PROJ.halves] == [QUERY, GATE]
    assert [half.whole for half in Q_PROJ.halves] == [Q_PROJ, Q_PROJ]
    assert Q_PROJ.halves[0].halves == ()


@pytest.mark.parametrize("match", [WHOLE, "text.attention.*", "*"])
@pytest.mark.parametrize("scheme", [int4(), INT8, FP8, None])
def test_a_rule_for_the_whole_decides_both_halves(match: str, scheme: Scheme | None) -> None:
    whole = rule(match, scheme)
    assert decide(Policy(rules=(whole,)), Q_PROJ, "q_proj") == (whole, (whole, whole))


@pytest.mark.parametrize(
    ("query", "gate", "winner"),
    [(int4(), INT8, GATE), (INT8, int4(), QUERY), (int4(), None, GATE), (None, FP8, QUERY), (NVFP4, FP8, GATE)],
)
def test_the_wider_decision_holds_for_both(query: Scheme | None, gate: Scheme | None, winner: str) -> None:
    found = decided(rule(GATE, gate), rule(WHOLE, query))
    assert found.scheme == (gate if winner == GATE else query)
    half = Part.OUTPUT_GATE if winner == GATE else Part.QUERY
    assert f"said of its {half.value}, and one stored matrix has one scheme" in found.reason


def test_two_schemes_of_one_width_are_refused() -> None:
    with pytest.raises(PlanError, match=r"halves of q_proj two schemes of one width, int8-channel-sym .* fp8-channel"):
        decided(rule(GATE, FP8), rule(WHOLE, INT8))


@pytest.mark.parametrize("scheme", [MXFP4, NVFP4, bnb4("nf4"), bnb4("fp4")], ids=str)
@pytest.mark.parametrize("match", [WHOLE, "text.attention.*"])
def test_no_rule_puts_four_bit_floats_into_the_gate_without_naming_it(match: str, scheme: Scheme) -> None:
    with pytest.raises(PlanError, match=r"q_proj to .*four-bit floats ruin.*text\.attention\.query\.output_gate"):
        decided(rule(match, scheme))
    for named in (GATE, "text.attention.query.*", "*.output_gate"):
        assert decided(rule(named, scheme), rule(match, scheme)).scheme == scheme


@pytest.mark.parametrize("scheme", [int4(32), MXFP4, NVFP4, bnb4("nf4"), bnb4("fp4")], ids=str)
def test_no_default_puts_four_bits_into_the_gate(scheme: Scheme) -> None:
    for section in (Section.TEXT, Section.MTP):
        role = TensorRole(section=section, kind=Kind.ATTENTION_QUERY, layer=0)
        assert decide(default_policy(scheme), role, "q_proj")[0].scheme is None


def test_a_plan_says_which_half_decided(tmp_path: Path) -> None:
    make_tiny(tmp_path / "src")
    rules = (
        rule(GATE, INT8),
        *(rule(f"text.attention.{part}", INT8) for part in ("key", "value")),
        rule(WHOLE, int4(32)),
    )
    plan = plan_conversion(tmp_path / "src", default_policy(int4(32), rules=rules))
    (step,) = [step for step in plan.steps if step.role.section is Section.TEXT and step.role.halves]
    assert isinstance(step.action, Quantize) and step.action.scheme == INT8
    assert step.action.reason == f"of {GATE}; said of its output_gate, and one stored matrix has one scheme"


def test_a_rule_for_a_half_of_nothing_is_refused(tmp_path: Path) -> None:
    make_tiny(tmp_path / "src")
    with pytest.raises(PlanError, match="decides no tensor"):
        plan_conversion(tmp_path / "src", default_policy(int4(32), rules=(rule("text.attention.key.query", None),)))
